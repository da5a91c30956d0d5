"""What an eye would find wrong with a figure: words that leave it, words over words, legends over data, tiny words."""

from __future__ import annotations

from itertools import combinations
from typing import Any
from unittest import mock

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

_SLACK = 2.5  # pixels that count as none: of rounding, and of the space around letters


def flaws(figure: Figure, *, least: float = 0.0) -> list[str]:
    """Everything that is wrong with it, in words.

    Args:
        figure: is drawn for this.
        least: points, under which words are too small to read.
    """
    words = drawn(figure)
    panels = [ax.get_window_extent() for ax in figure.axes if ax.get_visible()]
    in_data = {text for ax in figure.axes for text in ax.texts}  # a cell's number, a mark at a curve
    found = [f"leaves the figure: {text.get_text()!r}" for text, box in words.items() if not _inside(box, figure.bbox)]
    found += [f"smaller than {least:g} points: {text.get_text()!r}" for text in words if text.get_fontsize() < least]
    found += [
        f"over each other: {one.get_text()!r} and {other.get_text()!r}"
        for (one, box), (other, its) in combinations(words.items(), 2)
        if _overlap(box, its)
    ]
    found += [
        f"over data: {text.get_text()!r}"
        for text, box in words.items()
        if text not in in_data and any(_overlap(box, panel) for panel in panels)
    ]
    for legend in [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]:
        box = legend.get_window_extent()
        found += ["a legend over data"] * any(_overlap(box, panel) for panel in panels)
        found += ["a legend leaves the figure"] * (not _inside(box, figure.bbox))
    return found


def drawn(figure: Figure) -> dict[Text, Bbox]:
    """Every text that is drawn, and where: axes keep ticks that they made and do not show."""
    seen: dict[Text, Bbox] = {}
    draw = Text.draw

    def record(text: Text, renderer: Any, *options: Any, **more: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            seen[text] = text.get_window_extent(renderer)
        draw(text, renderer, *options, **more)

    with mock.patch.object(Text, "draw", record):
        FigureCanvasAgg(figure).draw()
    return seen


def _inside(box: Bbox, around: Bbox) -> bool:
    low = around.x0 - _SLACK <= box.x0 and around.y0 - _SLACK <= box.y0
    return bool(low and box.x1 <= around.x1 + _SLACK and box.y1 <= around.y1 + _SLACK)


def _overlap(one: Bbox, other: Bbox) -> bool:
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return bool(wide > _SLACK and high > _SLACK)
