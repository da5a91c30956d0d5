"""σ over its index: the lines are the stored values, the dots the ranks that the metric gives."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import spectra
from spectra.errors import SelectionError
from spectra.metrics.rank import rank_at
from spectra.plots.energy import scree_rows
from spectra.spectrum import Spectrum


def matrix(S, name="layers.0.v_proj.weight", **fields):
    return Spectrum(name, (len(S), len(S)), S=S, **fields)


def drawn(*arguments, **options):
    return spectra.plot_scree(*arguments, **options, ax=Figure(layout="constrained").subplots())


def test_one_matrix_is_its_values_and_the_dot_its_rank():
    S = np.geomspace(1, 1e-3, 40)
    ax = drawn([matrix(S)], energy=0.95)
    line, mark = ax.get_lines()
    assert np.array_equal(line.get_xdata(), np.arange(1, 41))
    assert np.allclose(line.get_ydata(), S, rtol=1e-15)
    rank = rank_at(matrix(S), 0.95)
    assert (line.get_marker(), line.get_markevery()) == ("o", [int(rank) - 1])
    assert list(mark.get_xdata()) == [rank, rank], "the energy line"
    assert line.get_label() == f"1 matrix, 95 % of the energy in {rank:g}"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert not ax.collections, "one matrix has no band"


def test_several_matrices_are_their_median_over_those_that_reach_an_index():
    first, second, third = [8.0, 4.0, 2.0], [6.0, 3.0, 1.0], [1.0, 0.5]
    ax = drawn({"a": [matrix(first), matrix(second, "b"), matrix(third, "c")], "b": [matrix([5.0])]})
    assert ax.get_lines()[0].get_ydata().tolist() == [6.0, 3.0, 1.5]
    assert len(ax.collections) == 1
    assert [line.get_label().split(":")[0] for line in ax.get_lines() if ":" in line.get_label()] == ["a", "b"]


def test_zeros_unresolved_values_and_matrices_without_a_spectrum_are_not_drawn():
    ax = drawn(
        [
            matrix([2.0, 1e-9, 0.0], resolution=1e-6),
            matrix([], "b", status="failed"),
            matrix([0.0], "c", status="unchanged"),
        ]
    )
    assert ax.get_lines()[0].get_ydata().tolist() == [2.0]
    assert ax.get_lines()[0].get_label().startswith("1 matrix")


def test_where_the_energy_is_not_known_there_is_no_dot():
    ax = drawn([Spectrum("a", (9, 9), S=[1.0, 1.0], norm=4.0)])
    (line,) = ax.get_lines()
    assert line.get_markevery() == [1], "at its end"
    assert "top of the spectra only" in ax.get_lines()[0].get_label()


def test_nothing_to_draw_and_a_wrong_share_are_errors():
    with pytest.raises(SelectionError, match="no nonzero singular value"):
        drawn([matrix([0.0], status="unchanged")])
    for energy in (0, 1.5, float("nan")):
        with pytest.raises(SelectionError, match="not a share"):
            drawn([matrix([1.0])], energy=energy)


def test_the_figure_says_how_many_directions_hold_the_energy_and_its_numbers_are_the_curves():
    few, many = [matrix([8.0, 1.0, 1.0])], [matrix([3.0, 2.0, 2.0]), matrix([3.0, 2.0, 2.0], "b")]
    figure = spectra.scree_figure({"few": few, "many": many}, energy=0.9)
    (ax,) = figure.axes
    assert ax.get_title() == "90 % of a matrix's energy in 1 (few) to 3 directions (many)"
    assert spectra.scree_figure(many).axes[0].get_title() == "90 % of a matrix's energy in 3 directions"
    rows = scree_rows({"few": few, "many": many})
    assert [row["median"] for row in rows if row["curve"] == "many"] == ax.get_lines()[2].get_ydata().tolist()
    cut = spectra.scree_figure([Spectrum("a", (9, 9), S=[1.0, 1.0], norm=4.0)])
    assert cut.axes[0].get_title() == "only the top of the spectra is known"


def test_the_legend_stands_beside_the_data():
    ax = drawn({f"run {i}": [matrix([2.0, 1.0])] for i in range(5)})
    FigureCanvasAgg(ax.figure).draw()
    assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())
    assert ax.get_legend().get_window_extent().x1 <= ax.figure.bbox.x1
