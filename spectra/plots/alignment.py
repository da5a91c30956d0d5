"""ΔW against W₀ in pictures: how W's top directions stand to W₀'s, and where in W₀'s spectrum ΔW's energy lies."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra import text
from spectra.errors import SelectionError
from spectra.naming import in_model_order
from spectra.plots.panels import above, panelled, put_legend, unbroken
from spectra.plots.similarity import tick_positions
from spectra.plots.sizes import DEFAULT, arranged
from spectra.plots.style import HEATMAP, curves, marked, name_chance, new_axes, stroke
from spectra.printing import in_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ROLES = 7
_COLUMNS = 4
_SQUARE, _BAR, _DECILES = (14.5, 17.5), 6.0, (24.0, 19.0)  # ems


def plot_cosines(
    cosines: Sequence[Sequence[float]] | np.ndarray, *, title: str = "", colorbar: bool = True, ax: Axes | None = None
) -> Axes:
    """Heatmap of |cos(x_i, y_j)|, W₀'s top left vectors downwards, those of W = W₀ + ΔW to the right.

    A fine-tune that keeps the model's main directions is a diagonal; a dark column is a direction that W₀'s top does
    not know, an intruder if no other vector of W₀ is near it either.

    Args:
        cosines: the column `cosines` of a row of `alignment`.
        title: above the heatmap.
        colorbar: whether to add one.
        ax: where to draw; None for a new figure.

    Reference: Shuttleworth et al. 2024, the heatmaps of LoRA against full fine-tuning.
    """
    values = np.asarray(cosines, dtype=np.float64)
    ax = new_axes(ax)
    rows, columns = values.shape
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    image = ax.imshow(values, vmin=0, vmax=1, cmap=HEATMAP, extent=extent, interpolation="nearest")
    ax.set_xticks(tick_positions(columns))
    ax.set_yticks(tick_positions(rows))
    ax.grid(visible=False)
    ax.set_xlabel("j: top directions of W", fontsize="small")
    ax.set_ylabel("i: top directions of W₀", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.set_title(in_figure(title), fontsize="small")
    if colorbar and ax.figure is not None:
        ax.figure.colorbar(image, ax=ax, label="|cos(x_i, y_j)|", shrink=0.9)
    return ax


def plot_deciles(table: pd.DataFrame, *, side: str = "left", ax: Axes | None = None) -> Axes:
    """The share of ΔW's energy in each tenth of W₀'s spectrum, the largest σ first: a curve per role.

    Curves are means over the matrices of a role. What an update would have that knows nothing of W₀ is dotted.

    Args:
        table: what `alignment` gives.
        side: "left" or "right" vectors of W₀.
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: there is nothing to draw, or the side is neither.
    """
    if side not in ("left", "right"):
        raise SelectionError(f"side={side!r} is not left or right")
    ax = new_axes(ax)
    tenths = np.arange(1, 11)
    for (role, rows), (colour, mark) in zip(_by_role(table).items(), curves(), strict=False):
        ax.plot(tenths, _mean(rows[f"{side}_deciles"]), color=colour, label=in_figure(role), **marked(mark))
        ax.plot(tenths, [_mean_chance(rows, side)] * 10, color=colour, linestyle=":", linewidth=stroke(0.6))
    ax.set_xticks(tenths)
    ax.set_ylim(0, None)
    ax.set_xlabel(f"tenths of W₀'s spectrum, largest σ first ({side})")
    ax.set_ylabel("share of ‖ΔW‖²")
    return ax


def tops_figure(table: pd.DataFrame, *, title: str = "", size: str = DEFAULT) -> Figure:
    """A heatmap of cosines per role, the mean over its matrices, under one colour scale.

    Args:
        table: what `alignment` gives.
        title: above all panels.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: there is nothing to draw.
    """
    roles = _by_role(table)
    layout = arranged(size, len(roles), _SQUARE, beside=_BAR, above=1.5 if title else 0.0, most=_COLUMNS)
    with panelled(layout, title=title, squares=True) as (figure, axes):
        for (role, group), ax in zip(roles.items(), axes, strict=False):
            heading = textwrap.fill(_heading(role, group), layout.letters(small=0.85))
            plot_cosines(mean_cosines(group), title=heading, colorbar=False, ax=ax)
        shrink = 1.8 / max(layout.rows, 2)
        figure.colorbar(axes[0].images[0], ax=axes, label="|cos(x_i, y_j)|", shrink=shrink)
    return figure


def deciles_figure(table: pd.DataFrame, *, title: str = "", size: str = DEFAULT) -> Figure:
    """The energy over W₀'s spectrum on both sides, with one legend.

    Args:
        table: what `alignment` gives.
        title: above the panels, and above what the first tenth has.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: there is nothing to draw.
    """
    layout = arranged(size, 2, _DECILES, above=5.0, stretched=True)
    with panelled(layout, title=above(title, _first_tenth(table))) as (figure, axes):
        for side, ax in zip(("left", "right"), axes, strict=True):
            plot_deciles(table, side=side, ax=ax)
        highest = max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(0, highest)
        name_chance(axes[0])
        put_legend(figure, axes[0], layout)
    return figure


def _first_tenth(table: pd.DataFrame) -> str:
    """What the figure of tenths says in a line."""
    done = table[table["status"] == "ok"]
    shares = [float(_mean(done[f"{side}_deciles"])[0]) for side in ("left", "right")]
    chances = [_mean_chance(done, side) for side in ("left", "right")]
    told = [unbroken(f"{100 * share:.0f} % {side} (by chance {100 * chance:.0f} %)")
            for share, chance, side in zip(shares, chances, ("left", "right"), strict=True)]  # fmt: skip
    return f"energy in the top tenth of W₀'s directions:\n{', '.join(told)}"


def mean_cosines(rows: pd.DataFrame) -> np.ndarray:
    """The mean over matrices, as far as all of them reach."""
    grids = [np.asarray(grid, dtype=np.float64) for grid in rows["cosines"]]
    height, width = (min(grid.shape[axis] for grid in grids) for axis in (0, 1))
    return np.mean([grid[:height, :width] for grid in grids], axis=0)


def alignment_numbers(table: pd.DataFrame) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the two figures show: a row per role, i and j, and a row per role, side and tenth."""
    grids: list[dict[str, Any]] = []
    tenths: list[dict[str, Any]] = []
    for role, rows in _by_role(table).items():
        grid = mean_cosines(rows)
        grids += [
            {"role": role, "i": i + 1, "j": j + 1, "cosine": float(value)} for (i, j), value in np.ndenumerate(grid)
        ]
        tenths += [
            {"role": role, "side": side, "tenth": place, "share": float(share), "chance": _mean_chance(rows, side)}
            for side in ("left", "right")
            for place, share in enumerate(_mean(rows[f"{side}_deciles"]), start=1)
        ]
    return grids, tenths


def undrawn_roles(table: pd.DataFrame) -> list[str]:
    """The roles that a figure has no room for."""
    return [role for role in dict.fromkeys(table["role"]) if role not in _by_role(table)]


def _by_role(table: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    done = table[table["status"] == "ok"]
    if not len(done):
        raise SelectionError("no matrix has numbers to draw")
    kept = set(done["role"].value_counts().index[:_MOST_ROLES])
    groups = dict(list(done.groupby("role", sort=False)))
    return {role: groups[role] for role in in_model_order(groups) if role in kept}


def _heading(role: str, rows: pd.DataFrame) -> str:
    count = int(rows["intruders"].sum())
    told = f"{count} {'intruder' if count == 1 else 'intruders'} in {text.matrices(len(rows))}"
    return f"{role}: {told}" + (", mean over them" if len(rows) > 1 else "")


def _mean(lists: Sequence[Sequence[float]]) -> np.ndarray:
    return np.mean([np.asarray(values, dtype=np.float64) for values in lists], axis=0)


def _mean_chance(rows: pd.DataFrame, side: str) -> float:
    """(s/10)/m: what a tenth of W₀'s s directions has of an update that knows nothing of it, in the mean."""
    tenth = np.array([min(out, inside) / 10 for out, inside in zip(rows["out"], rows["in"], strict=True)])
    return float(np.mean(tenth / rows["out" if side == "left" else "in"].to_numpy(dtype=np.float64)))
