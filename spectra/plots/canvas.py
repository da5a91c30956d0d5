"""A figure that shows itself as the value of a notebook's cell, and one that is laid out once for all formats."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import LayoutEngine

from spectra.plots.sizes import DEFAULT, SIZES
from spectra.plots.style import look

_PAD = 0.06  # inches that stay free above and below
_NO_ENGINE: Any = {"figure.autolayout": False, "figure.constrained_layout.use": False}


class ShownFigure(Figure):
    """A matplotlib figure outside pyplot's list of open ones: nothing to close, nothing shown twice.

    Args:
        text: how many points its text has; ticks are made only when it is drawn, and take their size from there.
        options: as Figure takes them.
    """

    def __init__(self, *, text: float, **options: Any) -> None:
        self.points = text
        super().__init__(**options)

    def draw(self, renderer: Any) -> None:
        """Draw it with the project's settings, whichever are set by then."""
        with look(self.points):
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()


@contextmanager
def laid_out_once(figure: Figure, formats: Sequence[str], dpi: float) -> Iterator[Callable[[], None]]:
    """While a figure is saved in these formats: its layout is found once, by the sizes that text has in the first.

    As long as a figure has a layout engine, `savefig` draws it twice, and the first time is for the engine alone. So
    it is taken out when it has done its work, and it is back afterwards. What a png needs, it does without a drawing.

    Args:
        figure: the figure.
        formats: in which order it is going to be saved.
        dpi: of the png.

    Yields:
        What to call when a format is saved.
    """
    engine = figure.get_layout_engine()

    def take_out() -> None:
        with mpl.rc_context(_NO_ENGINE):
            figure.set_layout_engine(None)

    if engine is None:
        yield lambda: None
        return
    try:
        if next(iter(formats), "") == "png":
            _lay_out(figure, engine, dpi)
            take_out()
        yield take_out
    finally:
        figure.set_layout_engine(engine)


def trim(figure: Figure, title: float = 0.0) -> None:
    """Take off the height that its panels leave blank, as squares do whose size the figure's width decides.

    Args:
        figure: without its title.
        title: inches that it is going to take.
    """
    engine = figure.get_layout_engine()
    assert engine is not None
    _lay_out(figure, engine, figure.dpi)
    canvas = figure.canvas
    try:
        renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
        boxes = [box for ax in figure.axes if ax.get_visible() and (box := ax.get_tightbbox(renderer)) is not None]
    finally:
        figure.set_canvas(canvas)
    free = min(box.y0 for box in boxes), figure.bbox.y1 - max(box.y1 for box in boxes)
    blank = sum(max(side / figure.dpi - _PAD, 0.0) for side in free)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height - blank + title)


def _lay_out(figure: Figure, engine: LayoutEngine, dpi: float) -> None:
    """Let the engine place the axes, as saving a png does before it draws anything."""
    canvas, before = figure.canvas, figure.dpi
    try:
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure)
        with look(figure.points if isinstance(figure, ShownFigure) else SIZES[DEFAULT].text):
            engine.execute(figure)
    finally:
        figure.set_canvas(canvas)
        figure.set_dpi(before)
