"""Heatmaps of the subspace similarity φ(i, j), with the chance level beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots.panels import unbroken
from spectra.plots.style import HEATMAP, new_axes
from spectra.printing import in_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.image import AxesImage

_MOST_TICKS = 4
_LONGEST_LABEL = 28  # characters of an update's name
NOTE_WIDTH = 48


def plot_similarity(
    similarity: SubspaceSimilarity,
    *,
    title: str | None = None,
    labels: tuple[str, str] = ("first update", "second update"),
    width: int = NOTE_WIDTH,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Heatmap of φ(i, j) from 0 to 1, i of the first update downwards, j of the second to the right.

    The title names the side and, where k was clamped or matrices were pooled, says so; the chance
    level stands below the axes and on the colour bar.

    Args:
        similarity: what `subspace_similarity` or `pool` gives.
        title: instead of the weight's name.
        labels: what the two updates are.
        width: characters in a line of the title.
        colorbar: whether to add one.
        ax: where to draw; None for a new figure.

    Reference: Hu et al. 2021, Fig. 3; Wang et al. 2023, Fig. 4.
    """
    ax = new_axes(ax)
    k = similarity.k_used
    image: AxesImage = ax.imshow(
        similarity.grid, vmin=0, vmax=1, cmap=HEATMAP, extent=(0.5, k + 0.5, k + 0.5, 0.5), interpolation="nearest"
    )
    ticks = tick_positions(k)
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.grid(visible=False)
    first, second = (shortened(label, _LONGEST_LABEL) for label in labels)
    ax.set_xlabel(in_figure(textwrap.fill(f"j: top directions of {second}", width - 11)), fontsize="small")
    ax.set_ylabel(in_figure(textwrap.fill(f"i: top directions of {first}", width - 11)), fontsize="small")
    ax.tick_params(labelsize="small")
    ax.set_title(in_figure(heading(similarity, title, width)), fontsize="small")
    if colorbar and ax.figure is not None:
        add_colorbar(image, [similarity], ax)
    return ax


def heading(similarity: SubspaceSimilarity, title: str | None = None, width: int = NOTE_WIDTH) -> str:
    """A panel's title; below it the side, φ at the corner and what chance would give; then the note."""
    k = similarity.k_used
    name = title if title is not None else similarity.title
    side = [] if name.endswith(f", {similarity.side}") else [similarity.side]
    facts = [*side, f"φ({k}, {k}) = {similarity.phi:.2f}", f"chance {similarity.chance[-1, -1]:.2f}"]
    told = ", ".join(map(unbroken, facts))
    parts = [_wrapped(name, width), _wrapped(told, width).replace("\u00a0", " "), _wrapped(similarity.note, width)]
    return "\n".join(part for part in parts if part)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines())


def grid_rows(panels: Mapping[str, SubspaceSimilarity | None]) -> list[dict[str, str | float]]:
    """The numbers of heatmaps, given as title → panel: panel, side, i, j, phi and chance, a row per cell."""
    return [
        {"panel": name, "side": item.side, "i": i, "j": j, "phi": phi, "chance": chance}
        for name, item in panels.items()
        if item is not None
        for i, (line, level) in enumerate(zip(item.grid.tolist(), item.chance.tolist(), strict=True), start=1)
        for j, (phi, chance) in enumerate(zip(line, level, strict=True), start=1)
    ]


def add_colorbar(
    image: AxesImage, similarities: Sequence[SubspaceSimilarity], ax: Axes | Sequence[Axes], shrink: float = 0.9
) -> Colorbar:
    """A colour bar from 0 to 1 with a mark where random subspaces would be at (k, k)."""
    first = ax if not isinstance(ax, Sequence) else ax[0]
    label = "φ(i, j)   (line: by chance)"
    bar: Colorbar = first.figure.colorbar(image, ax=ax, label=label, shrink=shrink, aspect=28)
    chances = [float(item.chance[-1, -1]) for item in similarities]
    for chance in {min(chances), max(chances)}:
        bar.ax.axhline(chance, color="white", linewidth=2.5)
        bar.ax.axhline(chance, color="black", linewidth=1)
    return bar


def tick_positions(k: int) -> list[int]:
    """1 and round steps up to k.

    >>> tick_positions(30)
    [1, 10, 20, 30]
    >>> tick_positions(8)  # the 2 would touch the 1
    [1, 4, 6, 8]
    """
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if k / size <= _MOST_TICKS)
    if step == 5 and k % 10 == 0 and k >= 30:
        step = 10
    return (
        [1, *range(step if step - 1 > step / 2 else 2 * step, k + 1, step)]
        if k > 1 and step > 1
        else [*range(1, k + 1)]
    )
