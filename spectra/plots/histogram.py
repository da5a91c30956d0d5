"""The −ln σ histogram of weight updates: who spreads over many directions, and who leans on a few."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spectra.errors import SelectionError
from spectra.plots.style import curves, new_axes
from spectra.types import DONE, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 100
_MOST_FILLED = 3  # more fills than this turn into mud
# What the heights are → the label of the axis.
STATS = {
    "percent": "share of the curve's values, %",
    "per_matrix": "values per matrix",
    "count": "number of values",
}


@dataclass(frozen=True, eq=False)
class PooledValues:
    """−ln σ of all resolved values of several updates, and what was left out.

    Attributes:
        label: the curve's name.
        x: −ln σ, ascending.
        matrices: how many updates were pooled.
        zero: values that are zero, those of unchanged matrices included.
        unresolved: values below the resolution of the method.
        missing: updates without a spectrum.
        edges: −ln of each update's storage-rounding edge, where it is known.
        truncated: whether some updates hold only the top of their spectrum.
    """

    label: str
    x: np.ndarray
    matrices: int
    zero: int
    unresolved: int
    missing: int
    edges: np.ndarray
    truncated: bool

    @property
    def legend(self) -> str:
        """The curve's line in the legend: how many values are drawn, and how many are not and why."""
        counts = [(self.zero, "zero"), (self.unresolved, "unresolved")]
        left_out = ", ".join(f"{count:,} {why}" for count, why in counts if count)
        parts = [f"{self.label}: {len(self.x):,} values of {self.matrices} matrices" if self.label else ""]
        parts[0] = parts[0] or f"{len(self.x):,} values of {self.matrices} matrices"
        parts += [f"left out: {left_out}"] if left_out else []
        parts += [f"{self.missing} matrices without spectrum"] if self.missing else []
        parts += ["top of the spectra only"] if self.truncated else []
        return "; ".join(parts)


def pool_values(spectra: Iterable[Spectrum], label: str = "") -> PooledValues:
    """Collect −ln σ of the nonzero resolved values of several updates.

    Example:
        >>> pooled = pool_values([Spectrum("a", (3, 3), S=[1.0, 1.0, 0.0])])
        >>> pooled.x.tolist(), pooled.zero
        ([-0.0, -0.0], 1)
    """
    kept: list[np.ndarray] = []
    edges: list[float] = []
    matrices = zero = unresolved = missing = 0
    truncated = False
    for spectrum in spectra:
        if spectrum.status not in DONE:
            missing += 1
            continue
        matrices += 1
        zero += int((spectrum.S == 0).sum())
        unresolved += len(spectrum.S) - spectrum.rank - int((spectrum.S == 0).sum())
        truncated |= not spectrum.complete
        kept.append(-np.log(spectrum.resolved))
        if spectrum.noise_edge:
            edges.append(-float(np.log(spectrum.noise_edge)))
    x = np.sort(np.concatenate(kept)) if kept else np.zeros(0)
    return PooledValues(label, x, matrices, zero, unresolved, missing, np.array(edges), truncated)


def plot_histogram(
    spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]],
    *,
    bins: int = BINS,
    close_up: float | None = None,
    stat: str = "percent",
    ax: Axes | None = None,
) -> Axes:
    """Histogram of −ln σ, large σ at the left; several updates overlaid on shared bin edges.

    Args:
        spectra: updates to pool, or label → updates for one curve each.
        bins: how many bins, over all curves together.
        close_up: draw only the window that the largest values fill, up to the point where this
            share of the values of one of the curves lies to the left; None for everything.
        stat: "percent" of each curve's values, "per_matrix" for their number divided by the number of
            matrices, which compares updates of unequal rank, or "count".
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: there is no nonzero value to draw, or an option is not one that exists.

    Reference: Wang et al. 2023, Figs. 1 and 5. The natural logarithm, the shared edges and the number
    of bins are this toolkit's choices; the paper does not state its own.
    """
    if stat not in STATS:
        raise SelectionError(f"stat={stat!r} is not one of {', '.join(STATS)}")
    curves_of = spectra if isinstance(spectra, Mapping) else {"": spectra}
    pooled = [pool_values(items, label) for label, items in curves_of.items()]
    return draw_pooled(pooled, bins=bins, close_up=close_up, stat=stat, ax=ax)


def draw_pooled(
    pooled: Sequence[PooledValues],
    *,
    bins: int = BINS,
    close_up: float | None = None,
    stat: str = "percent",
    ax: Axes | None = None,
) -> Axes:
    """`plot_histogram` for values that are pooled already."""
    drawn = [curve for curve in pooled if len(curve.x)]
    if not drawn:
        raise SelectionError("there is no nonzero singular value to draw: are all updates unchanged?")
    ax = new_axes(ax)
    low, high = _window(drawn, close_up)
    edges = np.linspace(low, high, bins + 1)
    for curve, (colour, line) in zip(drawn, curves(), strict=False):
        counts = np.histogram(curve.x, edges)[0].astype(float)
        heights = counts * {"percent": 100 / len(curve.x), "per_matrix": 1 / curve.matrices, "count": 1}[stat]
        if len(drawn) <= _MOST_FILLED:
            ax.stairs(heights, edges, fill=True, color=colour, alpha=0.18, linewidth=0)
        ax.stairs(heights, edges, color=colour, linestyle=line, linewidth=1.4, label=curve.legend)
    _shade_rounding(ax, drawn, low, high)
    ax.set_xlim(low, high)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("−ln σ of ΔW   (large σ at the left)")
    ax.set_ylabel(STATS[stat])
    ax.set_title("all values" if close_up is None else f"close-up: the largest values (first {close_up:.0%})")
    return ax


def _window(drawn: Sequence[PooledValues], close_up: float | None) -> tuple[float, float]:
    low = min(curve.x[0] for curve in drawn)
    high = max(curve.x[-1] for curve in drawn)
    if close_up is not None:
        if not 0 < close_up <= 1:
            raise SelectionError(f"close_up={close_up} is not a share between 0 and 1")
        high = max(np.quantile(curve.x, close_up) for curve in drawn)
    margin = 0.02 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _shade_rounding(ax: Axes, drawn: Sequence[PooledValues], low: float, high: float) -> None:
    """Shade what may be storage rounding alone: right of the median of the updates' rounding edges."""
    edges = np.concatenate([curve.edges for curve in drawn])
    if not len(edges):
        return
    edge = float(np.median(edges))
    if low < edge < high:
        ax.axvspan(edge, high, color="0.5", alpha=0.15, linewidth=0, zorder=0)
        ax.axvline(edge, color="0.25", linewidth=1, linestyle=":", label="storage-rounding edge (median)")
