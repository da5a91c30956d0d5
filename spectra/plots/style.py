"""One look for all figures: colours that survive colour blindness and grey print, plain spines, and text of one scale.

Plots give text by its weight, "small" or "x-small", and not in points: how large that is, the figure's size decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

from spectra.plots.sizes import DEFAULT, SIZES, arranged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008: distinguishable with any form of colour blindness; dark ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "X")  # one fewer than colours: none of the first 42 curves has both of another
_BELOW = 4.8  # ems from an axis to what stands below its numbers and its label
_SINGLE = (46.0, 30.0)  # ems of a plot alone, in a figure of its own
HEATMAP = "viridis"  # perceptually uniform, readable in grey
_RC: Any = {
    "axes.titlesize": "medium",
    "axes.labelsize": "medium",
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
    "legend.fontsize": "small",
    "figure.titlesize": "large",
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


def curves() -> Iterator[tuple[str, str]]:
    """Colour and mark of the first, second, … curve; no two curves share both, and none is dashed."""
    return zip(cycle(COLOURS), cycle(MARKS), strict=False)


# What is this thick, or this far away, for text of ten points; thinner and nearer for smaller text.
_SCALED = {
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
    "axes.linewidth": 0.8,
    "axes.titlepad": 6.0,
    "axes.labelpad": 4.0,
    "xtick.major.size": 3.5,
    "ytick.major.size": 3.5,
    "xtick.major.pad": 3.5,
    "ytick.major.pad": 3.5,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
}


@contextmanager
def look(text: float = SIZES[DEFAULT].text) -> Iterator[None]:
    """The project's settings while a figure is made, with text of this many points; the user's are back afterwards."""
    import matplotlib as mpl

    scaled = {name: value * text / 10 for name, value in _SCALED.items()}
    with mpl.rc_context(_RC | scaled | {"font.size": text}):
        yield


def stroke(share: float = 1.0) -> float:
    """The width of a line, as a share of the usual one of this size; in points."""
    import matplotlib as mpl

    return share * float(mpl.rcParams["lines.linewidth"])


def marked(mark: str) -> dict[str, Any]:
    """How a curve is drawn: thin and solid, with a mark of its own that grey print keeps."""
    import matplotlib as mpl

    size = 0.85 * float(mpl.rcParams["lines.markersize"])
    return {"linewidth": stroke(0.8), "marker": mark, "markersize": size, "markeredgewidth": 0}


def name_chance(ax: Axes) -> None:
    """Say in the legend that what is dotted would be there by chance."""
    ax.plot([], [], color="0.3", linestyle=":", linewidth=stroke(0.6), label="by chance")


def legend_below(ax: Axes) -> None:
    """The legend of a plot alone, under the numbers and the label of its axis, where it covers no data."""
    import matplotlib as mpl
    from matplotlib.transforms import ScaledTranslation

    figure = ax.get_figure(root=True)
    assert figure is not None
    em = float(mpl.rcParams["font.size"]) / 72
    below = ax.transAxes + ScaledTranslation(0, -_BELOW * em, figure.dpi_scale_trans)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, fontsize="small")


def hatch(ax: Axes, cells: Iterable[Sequence[int]]) -> None:
    """Mark the cells (row, column) of a heatmap that have no number."""
    from matplotlib.patches import Rectangle

    for i, j in cells:
        ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0))


def new_axes(ax: Axes | None) -> Axes:
    """The axes to draw into: the caller's, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    layout = arranged(DEFAULT, 1, _SINGLE)
    with look(layout.text):
        return plt.subplots(figsize=layout.inches, layout="constrained")[1]
