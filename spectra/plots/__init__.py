"""Pictures: axes-level functions that take `ax` and return it, and the figures made of them."""

from __future__ import annotations

from spectra.plots.depth import DepthGrid, depth_grid, plot_depth
from spectra.plots.figures import (
    depth_figure,
    draw_panels,
    histogram_figure,
    histogram_panels,
    save_figure,
    similarity_figure,
)
from spectra.plots.grouping import Comparison, curves_by_role, panels_by_role
from spectra.plots.histogram import plot_histogram
from spectra.plots.ranks import plot_kept_energy
from spectra.plots.scree import plot_scree
from spectra.plots.similarity import grid_rows, plot_similarity
from spectra.plots.stored import Drawn, draw_results

__all__ = [
    "Comparison",
    "DepthGrid",
    "Drawn",
    "curves_by_role",
    "depth_figure",
    "depth_grid",
    "draw_panels",
    "draw_results",
    "grid_rows",
    "histogram_figure",
    "histogram_panels",
    "panels_by_role",
    "plot_depth",
    "plot_histogram",
    "plot_kept_energy",
    "plot_scree",
    "plot_similarity",
    "save_figure",
    "similarity_figure",
]
