"""A figure that shows itself as the value of a notebook's cell, whether pyplot is loaded or not."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A matplotlib figure outside pyplot's list of open ones: nothing to close, nothing shown twice."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()
