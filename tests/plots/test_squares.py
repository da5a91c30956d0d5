"""N×N heatmaps by their artists: the cells, their order and names, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest

import spectra
from spectra.errors import SelectionError
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots.squares import evenly, short_names


def pairs(phi, labels="abc", layers=1):
    one = np.ones((1, 1))
    return spectra.Pairs(
        [
            spectra.Pair(a, b, SubspaceSimilarity(
                f"layers.{layer}.v_proj.weight", "left", 1, one * value, one / 4, np.zeros(1)
            ))
            for (a, b), value in phi.items()
            for layer in range(layers)
        ],
        labels=list(labels),
    )  # fmt: skip


PHI = {("a", "b"): 0.1, ("a", "c"): 0.9, ("b", "c"): 0.2}


def test_the_cells_are_the_square_with_its_numbers_and_names():
    square = np.array([[1.0, 0.25], [0.25, np.nan]])
    ax = spectra.plot_square(square, labels=["mine", "yours"], label="φ")
    assert np.array_equal(ax.images[0].get_array().filled(np.nan), square, equal_nan=True)
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.25", "0.25"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["mine (1)", "yours (2)"]
    assert [(patch.get_xy(), patch.get_hatch()) for patch in ax.patches] == [((0.5, 0.5), "////")]
    assert ax.figure.axes[1].get_ylabel() == "φ"
    with pytest.raises(SelectionError, match="3 labels for a square"):
        spectra.plot_square(square, labels=list("abc"))


def test_of_many_the_negative_ones_are_signed_which_grey_print_tells_from_the_positive():
    square = np.eye(9)
    square[0, 3], square[3, 0], square[1, 2] = -0.8, 0.8, -0.01
    ax = spectra.plot_square(square, limits=(-1.0, 1.0), colours="RdBu_r")
    assert [(text.get_position(), text.get_text()) for text in ax.texts] == [((3, 0), "−")]
    assert not spectra.plot_square(square, limits=(0.0, 1.0)).texts


def test_clustered_order_moves_rows_and_names_together():
    plain, ordered = (spectra.pairs_figure(pairs(PHI), clustered=clustered) for clustered in (False, True))
    names = [[tick.get_text()[0] for tick in figure.axes[0].get_yticklabels()] for figure in (plain, ordered)]
    assert names == [list("abc"), list("acb")]
    assert ordered.axes[0].images[0].get_array()[0].tolist() == [1.0, 0.9, 0.1]
    assert "k = 1, chance 0.25" in plain.axes[0].get_title()


def test_a_panel_per_layer_and_what_does_not_fit_is_said():
    figure = spectra.pairs_figure(pairs(PHI, layers=3), by="layer")
    assert [ax.get_title().splitlines()[0] for ax in figure.axes if ax.images] == [
        "all", "layer 0", "layer 1", "layer 2"
    ]  # fmt: skip
    many = spectra.pairs_figure(pairs(PHI, layers=40), by="layer")
    assert len([ax for ax in many.axes if ax.images]) == 24
    assert "(23 of 40 layers)" in many.get_suptitle()
    assert evenly([1, 2], 5) == [1, 2]


def test_nothing_to_draw_is_refused():
    with pytest.raises(SelectionError, match="no two updates to draw"):
        spectra.squares_figure({}, [])


def test_names_are_what_tells_paths_apart():
    assert short_names(["x/lora/final", "x/full/final"]) == ["lora", "full"]
    assert short_names(["same", "same2/deep"]) == ["same", "same2/deep"]
    assert max(map(len, short_names(["a" * 60, "b"]))) == 20


@pytest.mark.parametrize("paths", [
    [f"runs/{i}-a-folder-with-a-long-name/checkpoint" for i in range(12)],
    [f"runs/a-folder-with-a-long-name-{i}/checkpoint" for i in range(12)],
    [f"a-folder-with-a-long-{i}-name-and-more-words-behind-it" for i in range(12)],
])  # fmt: skip
def test_long_names_still_tell_updates_apart(paths):
    names = short_names(paths)
    assert len(set(names)) == 12
    assert max(map(len, names)) <= 20
