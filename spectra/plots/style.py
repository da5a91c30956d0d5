"""One look for all figures: colours that survive colour blindness and grey print, and plain spines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008: distinguishable with any form of colour blindness; dark ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
HEATMAP = "viridis"  # perceptually uniform, readable in grey
_RC: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "svg.hashsalt": "spectra",
    "pdf.fonttype": 42,
}


def curves() -> Iterator[tuple[str, Any]]:
    """Colour and line style of the first, second, … curve; no two curves share both."""
    return zip(cycle(COLOURS), cycle(LINES), strict=False)


@contextmanager
def look() -> Iterator[None]:
    """The project's settings while a figure is made; the user's own are back afterwards."""
    import matplotlib as mpl

    with mpl.rc_context(_RC):
        yield


def new_axes(ax: Axes | None) -> Axes:
    """The axes to draw into: the caller's, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    with look():
        return plt.subplots(figsize=(6.0, 4.0), layout="constrained")[1]
