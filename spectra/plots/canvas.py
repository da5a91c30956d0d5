"""A figure that shows itself as the value of a notebook's cell, whether pyplot is loaded or not."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

from spectra.plots.style import look


class ShownFigure(Figure):
    """A matplotlib figure outside pyplot's list of open ones: nothing to close, nothing shown twice.

    Args:
        text: how many points its text has; ticks are made only when it is drawn, and take their size from there.
        options: as Figure takes them.
    """

    def __init__(self, *, text: float, **options: Any) -> None:
        self._text = text
        super().__init__(**options)

    def draw(self, renderer: Any) -> None:
        """Draw it with the project's settings, whichever are set by then."""
        with look(self._text):
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()
