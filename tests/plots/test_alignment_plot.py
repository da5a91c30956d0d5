"""The pictures of ΔW against W₀, by their artists."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import spectra
from spectra.errors import SelectionError
from spectra.plots.alignment import alignment_numbers


def table():
    def row(role, layer, grid, tenths):
        return {
            "name": f"layers.{layer}.{role}.weight", "role": role, "status": "ok", "out": 40, "in": 20, "k": len(grid),
            "intruders": layer, "cosines": grid, "left_deciles": tenths, "right_deciles": tenths,
        }  # fmt: skip

    rising = [place / 55 for place in range(1, 11)]
    rows = [row("q_proj", 0, [[1.0, 0.0], [0.0, 1.0]], rising), row("q_proj", 1, [[0.5]], [0.1] * 10)]
    failed = {"name": "bad", "role": "q_proj", "status": "nonfinite", "cosines": None}
    return pd.DataFrame([*rows, row("v_proj", 0, [[0.2]], rising), failed])


def test_the_heatmap_holds_the_cosines_from_0_to_1():
    ax = spectra.plot_cosines([[1.0, 0.2], [0.1, 0.9]], ax=Figure().subplots())
    (image,) = ax.images
    assert image.get_array().tolist() == [[1.0, 0.2], [0.1, 0.9]]
    assert image.get_clim() == (0, 1)
    assert "W₀" in ax.get_ylabel()


def test_a_panel_per_role_is_the_mean_as_far_as_all_reach():
    figure = spectra.tops_figure(table(), title="run")
    panels = [ax for ax in figure.axes if ax.images]
    assert [" ".join(ax.get_title().split()) for ax in panels] == [
        "q_proj: 1 intruder in 2 matrices, mean over them",
        "v_proj: 0 intruders in 1 matrix",
    ]
    assert panels[0].images[0].get_array().tolist() == [[0.75]]


def test_the_deciles_are_means_with_chance_beside_them():
    for side, chance in (("left", 2 / 40), ("right", 2 / 20)):
        ax = spectra.plot_deciles(table(), side=side, ax=Figure().subplots())
        curve, dotted = ax.get_lines()[:2]
        wanted = [(place / 55 + 0.1) / 2 for place in range(1, 11)]
        assert curve.get_ydata().tolist() == pytest.approx(wanted)
        assert dotted.get_ydata() == pytest.approx(np.full(10, chance))
        assert curve.get_label() == "q_proj"
    (legend,) = spectra.deciles_figure(table()).legends
    assert [text.get_text() for text in legend.get_texts()] == ["q_proj", "v_proj", "by chance"]


def test_the_numbers_are_those_of_the_figures():
    grids, tenths = alignment_numbers(table())
    assert grids[0] == {"role": "q_proj", "i": 1, "j": 1, "cosine": 0.75}
    assert len(tenths) == 2 * 2 * 10
    assert tenths[0]["chance"] == 0.05


def test_nothing_to_draw_is_said():
    with pytest.raises(SelectionError, match="no matrix has numbers"):
        spectra.tops_figure(table()[table()["status"] != "ok"])
    with pytest.raises(SelectionError, match="side='up'"):
        spectra.plot_deciles(table(), side="up")
