"""Which rank is enough: the energy that an extracted LoRA keeps, over its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from spectra.extraction.ranks import kept_by_budget, kept_by_uniform_rank
from spectra.plots.style import curves, legend_below, marked, new_axes
from spectra.printing import in_figure
from spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIGN = 4.5, 1.5  # ems that a rank needs at a curve
_SIGNS = 4  # ranks that are written at a curve, beyond which every other one is


def plot_kept_energy(
    spectra: Iterable[Spectrum], *, label: str = "", legend: bool = True, ax: Axes | None = None
) -> Axes:
    """The share of Σ‖ΔW‖² that is kept, over the parameters of all factors together, logarithmic.

    One curve for the ranks that lose least (`rank_plan(…, parameters=N)`), and one for the same rank everywhere, with
    ranks that are powers of two marked. Where spectra hold their top only, the curves end with it.

    Args:
        spectra: the matrices of one update.
        label: what to put before the curves' names, to draw several updates into one axes.
        legend: whether to say below the axes which curve is which.
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: no matrix changed.
    """
    from matplotlib.text import Annotation

    ax = new_axes(ax)
    held = list(spectra)
    best, uniform = kept_by_budget(held), kept_by_uniform_rank(held)
    before = f"{label}: " if label else ""
    before_it = len(ax.get_lines()) // 2  # updates that are there already
    colour, mark = next(islice(curves(), before_it, None))
    ax.plot(best.parameters, best.kept, color=colour, label=in_figure(f"{before}ranks that lose least"))
    powers = [2**place - 1 for place in range(len(uniform.kept).bit_length())]
    ax.plot(
        uniform.parameters, uniform.kept, color=colour, markevery=powers,
        label=in_figure(f"{before}one rank for all"), **marked(mark),
    )  # fmt: skip
    there = [text for text in ax.texts if isinstance(text, Annotation)]
    for place in powers if len(powers) <= _SIGNS else powers[::2]:
        at = (uniform.parameters[place], uniform.kept[place])
        if any(text.xy[0] == at[0] for text in there):
            continue  # of another update of these matrices, straight above or below
        ax.annotate(f"r = {place + 1}", at, (0.4, -0.9), textcoords="offset fontsize", fontsize="x-small", color=colour)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.02)
    _thin(ax)
    ax.set_xlabel("parameters of all factors")
    ax.set_ylabel("kept energy  Σσ² kept / Σ‖ΔW‖²")
    if legend:
        legend_below(ax)
    return ax


def _thin(ax: Axes) -> None:
    """Hide the ranks at the curves that would be written over others."""
    from matplotlib.text import Annotation

    ax.autoscale_view()
    shown: list[tuple[float, float]] = []
    for sign in (text for text in ax.texts if isinstance(text, Annotation)):
        x, y = map(float, ax.transData.transform(sign.xy))
        em = float(sign.get_fontsize()) / 72 * ax.figure.dpi
        apart = all(abs(x - left) > _SIGN[0] * em or abs(y - low) > _SIGN[1] * em for left, low in shown)
        sign.set_visible(apart)
        shown += [(x, y)] if apart else []
