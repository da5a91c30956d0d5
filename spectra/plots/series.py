"""Curves along training: a metric of the updates over the steps, by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import SelectionError
from spectra.naming import in_model_order
from spectra.plots.panels import panelled, put_label, put_legend_of, put_title, unbroken
from spectra.plots.sizes import DEFAULT, arranged
from spectra.plots.style import curves, marked, name_chance, new_axes, stroke
from spectra.printing import in_figure
from spectra.results.series_table import by_role

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Column → what the axis is called.
SERIES_LABELS: Mapping[str, str] = {
    "norm": "‖ΔW‖_F",
    "relative_norm": "‖ΔW‖_F / ‖W₀‖_F",
    "stable_rank": "stable rank",
    "top_1_share": "share of the first direction",
    "effective_rank": "effective rank",
    "phi_to_last": "φ(k, k) to the last checkpoint",
    "phi_to_previous": "φ(k, k) to the one before",
    "start_left": "share within the start, left",
    "start_right": "share within the start, right",
}
_SHARES = ("top_1_share", "phi_to_last", "phi_to_previous", "start_left", "start_right")
_FIGURE = (
    "norm", "stable_rank", "top_1_share", "effective_rank",
    "phi_to_last", "phi_to_previous", "start_left", "start_right",
)  # fmt: skip
_COLUMNS = 4
_PANEL, _LETTERS = (17.0, 16.5), 18  # ems of a panel, and characters along its height
_MOST_ROLES = 7
_MOST_STEPS = 4  # whose numbers stand under a panel


def plot_series(table: pd.DataFrame, *, metric: str = "norm", ax: Axes | None = None) -> Axes:
    """One metric over the steps of training: a curve per role, the median over its layers, in a band of the quartiles.

    Chance levels are dotted, where the metric has one.

    Args:
        table: what `series` gives.
        metric: one of its columns of numbers.
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: the table has no such column, or no value in it.
    """
    if metric not in SERIES_LABELS or metric not in table:
        raise SelectionError(f"{metric!r} is not a metric along training; there are {', '.join(SERIES_LABELS)}")
    done = table[(table["status"] == "ok") & table[metric].notna()]
    if not len(done):
        raise SelectionError(f"no checkpoint has a value of {metric}")
    ax = new_axes(ax)
    styles = dict(zip(_roles(table), curves(), strict=False))
    for role, (colour, mark) in styles.items():
        groups = done[done["role"] == role].groupby("step")[metric]
        if not len(groups):
            continue
        middle, low, high = groups.median(), groups.quantile(0.25), groups.quantile(0.75)
        ax.fill_between(middle.index, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(middle.index, middle, color=colour, label=in_figure(role), **marked(mark))
        if f"{metric}_chance" in done:
            chance = done[done["role"] == role].groupby("step")[f"{metric}_chance"].median()
            ax.plot(chance.index, chance, color=colour, linestyle=":", linewidth=stroke(0.6))
    _number_steps(ax, sorted(set(done["step"])))
    ax.set_xlabel("step")
    ax.set_ylabel(SERIES_LABELS[metric])
    ax.set_ylim(0, 1.03 if metric in _SHARES else None)
    return ax


def _number_steps(ax: Axes, steps: Sequence[int]) -> None:
    """The checkpoints' own numbers where they are few and stand apart, and else whole ones."""
    from matplotlib.ticker import MaxNLocator

    apart = [after - before for before, after in pairwise(steps)]
    if len(steps) <= _MOST_STEPS and all(gap >= (steps[-1] - steps[0]) / _MOST_STEPS for gap in apart):
        ax.set_xticks(steps, [f"{step:,}" for step in steps])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(_MOST_STEPS, integer=True))
        ax.xaxis.set_major_formatter("{x:,.0f}")


def series_figure(
    table: pd.DataFrame, *, title: str = "", metrics: Sequence[str] = _FIGURE, size: str = DEFAULT
) -> Figure:
    """The metrics of an update along training, a panel each, with one legend.

    Metrics without a value get no panel. Roles beyond the seventh are left out.

    Args:
        table: what `series` gives.
        title: above the panels.
        metrics: columns of the table.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: there is nothing to draw.
    """
    done = table[table["status"] == "ok"]
    there = [name for name in metrics if name in done and done[name].notna().any()]
    if not there:
        raise SelectionError("no checkpoint has an update to draw")
    layout = arranged(size, len(there), _PANEL, above=4.0, most=_COLUMNS, stretched=True)
    with panelled(layout, title=title) as (figure, axes):
        for name, ax in zip(there, axes, strict=False):
            plot_series(table, metric=name, ax=ax)
            put_label(ax, SERIES_LABELS[name], _LETTERS)
            put_title(ax, _from_to(done, name), layout)
        if done.duplicated(["step", "role"]).any():
            axes[0].fill_between([], [], color="0.5", alpha=0.3, linewidth=0, label="quartiles over layers")
        if any(f"{name}_chance" in done for name in there):
            name_chance(axes[0])
        put_legend_of(figure, axes, layout)
    return figure


def _from_to(done: pd.DataFrame, metric: str) -> str:
    """What a panel says: the medians over all matrices at its first and its last step."""
    middle = done[done[metric].notna()].groupby("step")[metric].median()
    told = [f"{_short(middle.iloc[place])} at step {middle.index[place]:,}" for place in (0, -1)]
    parts = [f"median {told[0]}", told[1]][: len(middle)]
    return ", ".join(map(unbroken, parts))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def left_out_roles(table: pd.DataFrame) -> list[str]:
    """The roles that a figure has no room for."""
    there = list(dict.fromkeys(table.loc[table["status"] == "ok", "role"]))
    return [role for role in there if role not in _roles(table)]


def series_curves(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The numbers of the figure: medians per step and role."""
    rows = table.replace({np.nan: None}).to_dict("records")
    return by_role(rows)


def _roles(table: pd.DataFrame) -> list[str]:
    """The roles with the most matrices, in the model's order."""
    done = table[table["status"] == "ok"]
    return in_model_order(done["role"].value_counts(sort=True).index[:_MOST_ROLES])
