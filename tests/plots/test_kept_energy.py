"""The figure of kept energy, by its artists."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import spectra
from spectra.errors import SelectionError
from spectra.plots.energy import kept_rows
from spectra.plots.style import COLOURS
from spectra.spectrum import Spectrum


def some(seed):
    rng = np.random.default_rng(seed)
    shapes = [(8, 8), (24, 8), (8, 24)]
    return [Spectrum(str(i), shape, S=np.sort(rng.exponential(size=8))[::-1]) for i, shape in enumerate(shapes)]


def test_both_curves_rise_to_all_of_the_energy_and_the_better_one_is_above():
    found = some(0)
    ax = spectra.plot_kept_energy(found)
    best, uniform = ax.get_lines()
    for line in (best, uniform):
        x, y = line.get_data()
        assert (np.diff(x) > 0).all()
        assert (np.diff(y) >= 0).all()
        assert y[-1] == pytest.approx(1)
    plan = spectra.rank_plan(found, parameters=int(uniform.get_xdata()[2]))
    kept = 1 - (np.square(plan["relative_error"] * plan["norm"]).sum() / np.square(plan["norm"]).sum())
    assert kept >= uniform.get_ydata()[2]
    assert [text.get_text() for text in ax.texts] == [f"r = {rank}" for rank in (1, 2, 4, 8)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ranks that lose least", "one rank for all"]
    plt.close("all")


def test_two_updates_share_an_axes_with_curves_that_can_be_told_apart():
    ax = spectra.plot_kept_energy(some(0), label="a")
    assert spectra.plot_kept_energy(some(1), label="b", ax=ax) is ax
    looks = [(line.get_color(), line.get_marker()) for line in ax.get_lines()]
    assert len(set(looks)) == 4
    assert [colour for colour, _ in looks] == [colour for colour in COLOURS[:2] for _ in range(2)]
    assert [text.get_text() for text in ax.texts] == [f"r = {rank}" for rank in (1, 2, 4, 8)], "once for both"
    plt.close("all")


def test_updates_of_other_shapes_have_their_own_ranks_written():
    ax = spectra.plot_kept_energy(some(0), label="a")
    spectra.plot_kept_energy(some(1)[:1], label="b", ax=ax)
    assert len(ax.texts) == 8
    plt.close("all")


def test_the_figure_says_how_many_parameters_keep_the_energy():
    found = [Spectrum("a", (8, 8), S=[3.0, 1.0]), Spectrum("b", (8, 24), S=[3.0, 1.0])]
    figure = spectra.kept_energy_figure(found)
    assert figure.axes[0].get_title() == "90 % of the energy in 48 parameters"  # 19 of 20: b's second is not needed
    assert rank_plan_keeps(found, 47) < rank_plan_keeps(found, 48) == pytest.approx(0.9)
    both = spectra.kept_energy_figure({"these": found, "one": found[:1]}, energy=0.5)
    assert both.axes[0].get_title() == "50 % of the energy in 16 (one) to 48 parameters (these)"
    rows = kept_rows(found)
    best = [row["kept"] for row in rows if row["ranks"] == "best"]
    assert best == figure.axes[0].get_lines()[0].get_ydata().tolist()


def rank_plan_keeps(found, parameters):
    plan = spectra.rank_plan(found, parameters=parameters)
    return 1 - np.square(plan["relative_error"] * plan["norm"]).sum() / np.square(plan["norm"]).sum()


def test_nothing_to_draw_is_an_error():
    with pytest.raises(SelectionError, match="no matrix changed"):
        spectra.plot_kept_energy([Spectrum("a", (2, 2), "unchanged", S=[0.0, 0.0])])
