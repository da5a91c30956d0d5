"""Pictures: axes-level functions that take `ax` and return it, and the figures made of them."""

from __future__ import annotations

from spectra.plots.alignment import cosines_figure, deciles_figure, plot_cosines, plot_deciles
from spectra.plots.figures import draw_panels, histogram_figure, histogram_panels, save_figure, similarity_figure
from spectra.plots.grouping import Comparison, curves_by_role, pages_by_layer, panels_by_role
from spectra.plots.histogram import plot_histogram
from spectra.plots.ranks import plot_kept_energy
from spectra.plots.series import plot_series, series_figure
from spectra.plots.similarity import grid_rows, plot_similarity
from spectra.plots.stored import draw_results
from spectra.plots.tables import Drawn

__all__ = [
    "Comparison",
    "Drawn",
    "cosines_figure",
    "curves_by_role",
    "deciles_figure",
    "draw_panels",
    "draw_results",
    "grid_rows",
    "histogram_figure",
    "histogram_panels",
    "pages_by_layer",
    "panels_by_role",
    "plot_cosines",
    "plot_deciles",
    "plot_histogram",
    "plot_kept_energy",
    "plot_series",
    "plot_similarity",
    "save_figure",
    "series_figure",
    "similarity_figure",
]
