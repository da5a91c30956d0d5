"""Which spectra make a curve and which similarities a panel."""

from __future__ import annotations

import numpy as np

import spectra
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots import Comparison, curves_by_role, pages_by_layer, panels_by_role
from spectra.spectrum import Spectrum


def similarity(role, side, layer=0, phi=0.5):
    grid = np.full((2, 2), phi)
    return SubspaceSimilarity(f"layers.{layer}.{role}.weight", side, 2, grid, grid / 8, np.zeros(2))


def test_the_curves_with_the_most_values_are_kept_in_the_models_order():
    sizes = {"q_proj": 1, "k_proj": 3, "v_proj": 2}
    spectra = [Spectrum(f"layers.0.{role}.weight", (4, 4), S=np.ones(n), norm=9.0) for role, n in sizes.items()]
    curves, left_out = curves_by_role(spectra, most=2)
    assert list(curves) == ["k_proj", "v_proj"]
    assert left_out == ["q_proj"]
    assert curves_by_role([]) == ({}, [])


def test_layers_are_curves_of_their_own_where_there_are_layers():
    names = ["layers.0.q_proj.weight", "layers.1.q_proj.weight", "layers.1.q_proj.weight[a]", "lm_head.weight"]
    pages = pages_by_layer([Spectrum(name, (2, 2), S=[1.0]) for name in names])
    assert {page: {name: len(members) for name, members in curves.items()} for page, curves in pages.items()} == {
        "q_proj, layers 0 to 1": {"q_proj, layer 0": 1, "q_proj, layer 1": 2},
        "lm_head": {"lm_head": 1},
    }


def test_many_layers_are_pages_as_even_as_they_go():
    names = [f"layers.{i}.{role}.weight" for i in reversed(range(32)) for role in ("v_proj", "q_proj")]
    pages = pages_by_layer([Spectrum(name, (2, 2), S=[1.0]) for name in names])
    assert [len(curves) for curves in pages.values()] == [7, 7, 7, 7, 4] * 2
    assert list(pages)[:2] == ["q_proj, layers 0 to 6", "q_proj, layers 7 to 13"]
    assert len({label for curves in pages.values() for label in curves}) == 64


def test_rows_are_roles_and_sides_and_columns_are_comparisons():
    one = Comparison("one", ("a", "full"), [similarity("v_proj", "left"), similarity("v_proj", "right")])
    two = Comparison("two", ("b", "full"), [similarity("q_proj", "left"), similarity("v_proj", "left", phi=0.25)])
    panels = panels_by_role([one, two])
    assert list(panels.similarities) == [
        *("one: q_proj, left", "two: q_proj, left"),
        *("one: v_proj, left", "two: v_proj, left"),
        *("one: v_proj, right", "two: v_proj, right"),
    ]
    empty = [name for name, panel in panels.similarities.items() if panel is None]
    assert empty == ["one: q_proj, left", "two: v_proj, right"]
    assert panels.labels["two: v_proj, left"] == ("b", "full")
    assert panels.columns == 2


def test_matrices_of_a_role_are_pooled_and_titles_are_as_short_as_they_can_be():
    pair = [similarity("v_proj", "left", layer, phi) for layer, phi in enumerate((0.25, 0.75))]
    panels = panels_by_role([Comparison("one", ("a", "b"), pair)], named=False)
    ((title, panel),) = panels.similarities.items()
    assert title == "v_proj, left"
    assert panel.phi == 0.5
    assert panels.columns is None
    (named,) = panels_by_role([Comparison("one", ("a", "b"), pair)]).similarities
    assert named == "one: v_proj"


def test_a_role_looks_the_same_whichever_number_is_drawn():
    rows = [{"role": role, "layer": 0, "cosine": None if role == "q_proj" else 0.1, "norm": 1.0}
            for role in ("q_proj", "k_proj", "v_proj")]  # fmt: skip
    figure = spectra.heads_figure(rows)
    looks = [{line.get_label(): (line.get_color(), line.get_marker()) for line in ax.get_lines()
              if not line.get_label().startswith("_")} for ax in figure.axes if ax.get_visible()]  # fmt: skip
    assert list(looks[0]) == ["k_proj", "v_proj"]
    assert looks[1] | looks[0] == looks[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["k_proj", "v_proj", "q_proj"]
