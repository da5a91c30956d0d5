"""Names at the ends of curves: which is which without colours, dashes or a look aside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spectra.plots.style import stroke
from spectra.printing import in_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BESIDE, _GAP = 1.06, 0.008  # where names begin, and what is left free before them, in widths of the axes
_LINE = 1.08  # ems from a name to the next, which are small


def name_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], *, height: float) -> None:
    """Write the name of each curve that ends at the right edge beside the axes, as near to its end as names go.

    Args:
        ax: with the vertical limits that it will have; that axis may be logarithmic.
        ends: the height, the colour and the name of each.
        height: of the axes, in ems.
    """
    from matplotlib.lines import Line2D

    shares = [_share(ax, end) for end, _, _ in ends]
    lines = max(len(name.splitlines()) for _, _, name in ends)
    for share, place, (_, colour, name) in zip(shares, spread(shares, lines * _LINE / height), ends, strict=True):
        ax.add_artist(
            Line2D([1.0, _BESIDE - _GAP], [share, place], color=colour, linewidth=stroke(0.8), transform=ax.transAxes,
                   clip_on=False)
        )  # fmt: skip
        ax.text(_BESIDE, place, in_figure(name), transform=ax.transAxes, va="center", fontsize="small")


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places in 0 … 1 moved as little as possible, in the mean of squares, so that they are a gap apart.

    >>> spread([0.5, 0.9, 0.5], 0.2)
    [0.4, 0.9, 0.6]
    """
    order = np.argsort(places, kind="stable")
    gap = min(gap, 1 / max(len(places), 1))
    steps = gap * np.arange(len(places))
    groups: list[list[float]] = []  # of what is left of each when its steps are taken off, which must ascend
    for value in np.asarray(places, dtype=np.float64)[order] - steps:
        groups.append([float(value)])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    level = np.concatenate([np.full(len(group), np.mean(group)) for group in groups]) if groups else np.zeros(0)
    moved = np.clip(level, gap / 2, 1 - gap / 2 - steps[-1] if len(steps) else 1.0) + steps
    placed = np.empty(len(places))
    placed[order] = moved
    return [round(float(value), 6) for value in placed]


def _share(ax: Axes, y: float) -> float:
    """Where a height lies between the axes' limits."""
    low, high, value = ax.transScale.transform([(1.0, y) for y in (*ax.get_ylim(), y)])[:, 1]
    return float((value - low) / (high - low))
