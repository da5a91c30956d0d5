"""Curves along training: a metric of the updates over the steps, by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import SelectionError
from spectra.plots.style import curves, look, new_axes
from spectra.printing import in_figure
from spectra.results.series import by_role

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
_MOST_ROLES = 7


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
    for role, (colour, line) in styles.items():
        groups = done[done["role"] == role].groupby("step")[metric]
        if not len(groups):
            continue
        middle, low, high = groups.median(), groups.quantile(0.25), groups.quantile(0.75)
        ax.fill_between(middle.index, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(middle.index, middle, color=colour, linestyle=line, marker="o", markersize=3, label=in_figure(role))
        if f"{metric}_chance" in done:
            chance = done[done["role"] == role].groupby("step")[f"{metric}_chance"].median()
            ax.plot(chance.index, chance, color=colour, linestyle=":", linewidth=0.9)
    ax.set_xlabel("step")
    ax.set_ylabel(SERIES_LABELS[metric])
    ax.set_ylim(0, 1.03 if metric in _SHARES else None)
    return ax


def series_figure(table: pd.DataFrame, *, title: str = "", metrics: Sequence[str] = _FIGURE) -> Figure:
    """The metrics of an update along training, a panel each, with one legend.

    Metrics without a value get no panel. Roles beyond the seventh are left out.

    Args:
        table: what `series` gives.
        title: above the panels.
        metrics: columns of the table.

    Raises:
        SelectionError: there is nothing to draw.
    """
    from spectra.plots.canvas import ShownFigure

    done = table[table["status"] == "ok"]
    there = [name for name in metrics if name in done and done[name].notna().any()]
    if not there:
        raise SelectionError("no checkpoint has an update to draw")
    columns = min(_COLUMNS, len(there))
    rows = -(-len(there) // columns)
    with look():
        figure = ShownFigure(figsize=(3.1 * columns, 2.6 * rows + 0.6), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for name, ax in zip(there, axes, strict=False):
            plot_series(table, metric=name, ax=ax)
            ax.tick_params(labelsize=8)
        for ax in axes[len(there) :]:
            ax.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), fontsize=9)
        if title:
            figure.suptitle(in_figure(title), wrap=True)
    return figure


def left_out_roles(table: pd.DataFrame) -> list[str]:
    """The roles that a figure has no room for."""
    there = list(dict.fromkeys(table.loc[table["status"] == "ok", "role"]))
    return [role for role in there if role not in _roles(table)]


def series_curves(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The numbers of the figure: medians per step and role."""
    rows = table.replace({np.nan: None}).to_dict("records")
    return by_role(rows)


def _roles(table: pd.DataFrame) -> list[str]:
    """The roles with the most matrices, in the table's order."""
    done = table[table["status"] == "ok"]
    kept = set(done["role"].value_counts(sort=True).index[:_MOST_ROLES])
    return [role for role in dict.fromkeys(done["role"]) if role in kept]
