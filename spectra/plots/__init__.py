"""Pictures: axes-level functions that take `ax` and return it, and the figures made of them."""

from __future__ import annotations

from spectra.plots.figures import histogram_figure, save_figure, similarity_figure
from spectra.plots.histogram import plot_histogram
from spectra.plots.similarity import plot_similarity

__all__ = ["histogram_figure", "plot_histogram", "plot_similarity", "save_figure", "similarity_figure"]
