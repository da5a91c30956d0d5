"""The −ln σ histogram of weight updates: who spreads over many directions, and who leans on a few."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spectra.errors import SelectionError, refuse_path_for_spectra
from spectra.plots.ends import name_ends
from spectra.plots.panels import even_lines, unbroken
from spectra.plots.style import curves, legend_below, new_axes, stroke
from spectra.printing import in_figure
from spectra.results.collection import Spectra
from spectra.spectrum import DONE, Spectrum
from spectra.text import matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

BINS = 100
_ROOM = 1.08  # height of a row, by that of the tallest bar
_TICKS = 6
_WIDTH = 56  # characters over and under axes of the usual size
LONGEST_NAME = 22  # characters in a line beside a row, or at the end of a line
ROW, LEAST_ROWS = 3.2, 4  # ems of a curve's row in a figure, which is never less high than so many
# What the heights are → the label of the axis.
STATS = {
    "percent": "% of the curve's values",
    "per_matrix": "values per matrix",
    "count": "number of values",
    "at_least": "values per matrix ≥ σ",
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
        possible: Σ min(out, in) over the updates, whatever their rank.
    """

    label: str
    x: np.ndarray
    matrices: int
    zero: int
    unresolved: int
    missing: int
    edges: np.ndarray
    truncated: bool
    possible: int = 0

    @property
    def legend(self) -> str:
        """The curve's line in the legend: how many values are drawn, and how many are not and why."""
        counts = [(self.zero, "zero"), (self.unresolved, "unresolved")]
        left_out = ", ".join(f"{count:,} {why}" for count, why in counts if count)
        drawn = f"{len(self.x):,} {'value' if len(self.x) == 1 else 'values'} of {matrices(self.matrices)}"
        parts = [f"{self.label}: {drawn}" if self.label else drawn]
        parts += [f"left out: {left_out}"] if left_out else []
        parts += [f"{matrices(self.missing)} without spectrum"] if self.missing else []
        parts += ["top of the spectra only"] if self.truncated else []
        return "; ".join(parts)


@dataclass(frozen=True, eq=False)
class BinnedCurve:
    """One curve of a panel.

    Attributes:
        values: what was counted.
        counts: how many of the values each bin holds.
        heights: what is drawn, in the unit of the panel's `stat`.
    """

    values: PooledValues
    counts: np.ndarray
    heights: np.ndarray


@dataclass(frozen=True, eq=False)
class BinnedPanel:
    """One panel of a histogram in numbers: what the figure draws is what `rows` lists.

    Attributes:
        edges: of the bins, shared by the curves.
        curves: those that have a value to draw.
        stat: what the heights are, one of `STATS`.
        close_up: see `plot_histogram`.
    """

    edges: np.ndarray
    curves: tuple[BinnedCurve, ...]
    stat: str
    close_up: float | None = None

    @property
    def name(self) -> str:
        """Which of the two views it is."""
        return "all values" if self.close_up is None else "close-up"

    def rows(self) -> list[dict[str, str | float]]:
        """One row per curve and bin: panel, curve, left and right edge, height as drawn, count."""
        edges = self.edges.tolist()
        return [
            {
                "panel": self.name,
                "curve": curve.values.label,
                "left": left,
                "right": right,
                "height": height,
                "count": count,
            }
            for curve in self.curves
            for left, right, height, count in zip(
                edges[:-1], edges[1:], curve.heights.tolist(), curve.counts.tolist(), strict=True
            )
        ]


def pool_values(spectra: Iterable[Spectrum], label: str = "") -> PooledValues:
    """Collect −ln σ of the nonzero resolved values of several updates.

    Example:
        >>> pooled = pool_values([Spectrum("a", (3, 3), S=[1.0, 1.0, 0.0])])
        >>> pooled.x.tolist(), pooled.zero
        ([-0.0, -0.0], 1)
    """
    refuse_path_for_spectra(spectra, "a plot")
    kept: list[np.ndarray] = []
    edges: list[float] = []
    matrices = zero = unresolved = missing = possible = 0
    truncated = False
    for spectrum in spectra.without_vectors() if isinstance(spectra, Spectra) else spectra:
        if spectrum.status not in DONE:
            missing += 1
            continue
        matrices += 1
        possible += min(spectrum.shape)
        zero += int((spectrum.S == 0).sum())
        unresolved += len(spectrum.S) - spectrum.rank - int((spectrum.S == 0).sum())
        truncated |= not spectrum.complete
        kept.append(-np.log(spectrum.resolved))
        if spectrum.noise_edge:
            edges.append(-float(np.log(spectrum.noise_edge)))
    x = np.sort(np.concatenate(kept)) if kept else np.zeros(0)
    return PooledValues(label, x, matrices, zero, unresolved, missing, np.array(edges), truncated, possible)


def pool_curves(spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]]) -> list[PooledValues]:
    """`pool_values` of each curve: of updates that make one curve, or of label → updates."""
    curves_of = spectra if isinstance(spectra, Mapping) else {"": spectra}
    return [pool_values(items, label) for label, items in curves_of.items()]


def plot_histogram(
    spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]],
    *,
    bins: int = BINS,
    close_up: float | None = None,
    stat: str = "percent",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Histogram of −ln σ, large σ at the left; several updates in rows below one another, with shared bins and heights.

    Args:
        spectra: updates to pool, or label → updates for one curve each.
        bins: how many bins, over all curves together.
        close_up: draw only the window that the largest values fill: of every curve, as far as this share of
            min(out, in) values per matrix reaches, or all that it has if they are fewer; None for everything.
        stat: "percent" of each curve's values, "per_matrix" for their number divided by the number of
            matrices, which compares updates of unequal rank, "count", or "at_least" for how many values per matrix
            are as large as the bin's smallest, or larger, on a logarithmic axis.
        legend: whether to say below the axes which curve is which, how many values it shows and how many not.
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: there is no nonzero value to draw, or an option is not one that exists.

    Reference: Wang et al. 2023, Figs. 1 and 5. The natural logarithm, the shared edges and the number
    of bins are this toolkit's choices; the paper does not state its own.
    """
    ax = draw_binned(bin_pooled(pool_curves(spectra), bins=bins, close_up=close_up, stat=stat), ax)
    if legend:
        legend_below(ax)
    return ax


def bin_pooled(
    pooled: Sequence[PooledValues], *, bins: int = BINS, close_up: float | None = None, stat: str = "percent"
) -> BinnedPanel:
    """The bins and heights that `plot_histogram` draws of values that are pooled already."""
    if stat not in STATS:
        raise SelectionError(f"stat={stat!r} is not one of {', '.join(STATS)}")
    drawn = [curve for curve in pooled if len(curve.x)]
    if not drawn:
        raise SelectionError("there is no nonzero singular value to draw: are all updates unchanged?")
    edges = np.linspace(*_window(drawn, close_up), bins + 1)
    curves_of = []
    for curve in drawn:
        counts = np.histogram(curve.x, edges)[0]
        unit = {"percent": 100 / len(curve.x), "count": 1.0}.get(stat, 1 / curve.matrices)
        curves_of.append(BinnedCurve(curve, counts, (counts.cumsum() if stat == "at_least" else counts) * unit))
    return BinnedPanel(edges, tuple(curves_of), stat, close_up)


def draw_binned(panel: BinnedPanel, ax: Axes | None = None, *, width: int = _WIDTH) -> Axes:
    """Draw what `bin_pooled` counted: a filled row per curve on a common scale, or lines that climb for "at_least".

    The title's lines, and the words below, have `width` characters.
    """
    from matplotlib.ticker import MaxNLocator

    ax = new_axes(ax)
    low, high = float(panel.edges[0]), float(panel.edges[-1])
    if panel.stat == "at_least":
        _draw_climbs(panel, ax)
    else:
        _draw_rows(panel, ax)
    _shade_rounding(ax, [binned.values for binned in panel.curves], low, high)
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(MaxNLocator(max(min(width // 9, _TICKS), 3)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}\n{_sigma(x)}".replace("-", "−"))
    ax.set_xlabel(even_lines(f"−ln σ of ΔW {unbroken('(below it σ;')} large σ at the left)", width))
    ax.set_title(in_figure(_filled(finding(panel), width)))
    return ax


def _filled(words: str, width: int) -> str:
    return "\n".join(even_lines(line, width) for line in words.splitlines())


def _sigma(x: float) -> str:
    """σ of a −ln σ, short enough to stand under it."""
    sigma = float(np.exp(-x))
    return f"{sigma:.2g}" if sigma >= 1e-3 else f"{sigma:.0e}".replace("e-0", "e-")


def _draw_rows(panel: BinnedPanel, ax: Axes) -> None:
    """A row per curve, the first at the top: nothing covers anything, and one height means one number in all rows."""
    from matplotlib.transforms import Affine2D

    count = len(panel.curves)
    tallest = max(float(curve.heights.max()) for curve in panel.curves) or 1.0
    step = _ROOM * tallest
    for place, (binned, (colour, _)) in enumerate(zip(panel.curves, curves(), strict=False)):
        base = (count - 1 - place) * step
        # The patch keeps the heights as they are; what lifts it is its transform.
        lifted = Affine2D().translate(0, base) + ax.transData
        ax.stairs(
            binned.heights, panel.edges, fill=True, facecolor=(colour, 0.75), edgecolor=colour, linewidth=stroke(0.5),
            label=in_figure(binned.values.legend), transform=lifted,
        )  # fmt: skip
        if count > 1:
            ax.axhline(base, color=colour, linewidth=stroke(0.5))
    ax.set_ylim(0, count * step)
    if count == 1:
        ax.set_ylabel(STATS[panel.stat])
        return
    ax.set_yticks(
        [(count - 1 - place) * step for place in range(count)],
        [in_figure("\n".join(textwrap.wrap(curve.values.label, LONGEST_NAME))) for curve in panel.curves],
    )
    ax.tick_params(axis="y", length=0)
    for label in ax.get_yticklabels():
        label.set_verticalalignment("bottom")
    ax.grid(visible=False, axis="y")
    ax.set_ylabel(f"{STATS[panel.stat]}  (row: 0–{step:.2g})")


def _plain_log() -> Formatter:
    """Numbers between powers of ten as people write them, and only where there is no more than a decade."""
    from matplotlib.ticker import LogFormatter

    class PlainLog(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return PlainLog()


def _draw_climbs(panel: BinnedPanel, ax: Axes) -> None:
    """A line per curve on a logarithmic axis, from the largest value on, with its name at its end."""
    ends = []
    for binned, (colour, _) in zip(panel.curves, curves(), strict=False):
        ax.stairs(
            binned.heights, panel.edges, baseline=None, edgecolor=colour, linewidth=stroke(0.8),
            label=in_figure(binned.values.legend),
        )  # fmt: skip
        name = "\n".join(textwrap.wrap(binned.values.label, LONGEST_NAME))
        ends.append((float(binned.heights[-1]), colour, name))
    least = min(float(curve.heights[curve.heights > 0].min()) for curve in panel.curves if curve.heights.any())
    ax.set_yscale("log")
    ax.set_ylim(0.8 * least, 1.5 * max(float(curve.heights.max()) for curve in panel.curves))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.yaxis.set_minor_formatter(_plain_log())
    ax.set_ylabel(STATS[panel.stat])
    if len(ends) > 1:
        name_ends(ax, ends, height=ROW * max(len(ends), LEAST_ROWS))


def finding(panel: BinnedPanel) -> str:
    """What a panel says in a line: the largest value and the medians, or where the close-up ends."""
    if panel.close_up is not None:
        return f"{panel.name}: the largest values, σ\u00a0≥\u00a0{np.exp(-panel.edges[-1]):.2g}"
    drawn = [curve.values for curve in panel.curves]
    first = min(drawn, key=lambda values: values.x[0])
    largest = f"largest σ {np.exp(-first.x[0]):.3g}"
    medians = {values.label: float(np.exp(-np.median(values.x))) for values in drawn}
    if len(drawn) == 1:
        return f"{panel.name}: {largest}, median {medians[first.label]:.3g}"
    low, high = (choose(medians, key=lambda label: medians[label]) for choose in (min, max))
    return f"{largest} in {first.label};\nmedians from {medians[low]:.3g} ({low}) to {medians[high]:.3g} ({high})"


def _window(drawn: Sequence[PooledValues], close_up: float | None) -> tuple[float, float]:
    low = min(curve.x[0] for curve in drawn)
    high = max(curve.x[-1] for curve in drawn)
    if close_up is not None:
        if not 0 < close_up <= 1:
            raise SelectionError(f"close_up={close_up} is not a share between 0 and 1")
        # Counted of min(out, in), not of a curve's own values: a LoRA has few, and its first percent is none of them.
        high = max(curve.x[min(max(1, round(close_up * curve.possible)), len(curve.x)) - 1] for curve in drawn)
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
        ax.axvline(edge, color="0.25", linewidth=stroke(0.7), linestyle=":", label="storage-rounding edge (median)")
