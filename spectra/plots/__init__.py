"""Pictures: axes-level functions that take `ax` and return it, and the figures made of them."""

from __future__ import annotations

from spectra.plots.figures import draw_panels, histogram_figure, histogram_panels, save_figure, similarity_figure
from spectra.plots.histogram import plot_histogram
from spectra.plots.similarity import grid_rows, plot_similarity

__all__ = [
    "draw_panels",
    "grid_rows",
    "histogram_figure",
    "histogram_panels",
    "plot_histogram",
    "plot_similarity",
    "save_figure",
    "similarity_figure",
]
