"""Pictures: axes-level functions that take `ax` and return it, and the figures made of them."""

from __future__ import annotations

from spectra.plots.depth import DepthGrid, depth_grid, plot_depth
from spectra.plots.figures import (
    draw_panels,
    histogram_figure,
    histogram_panels,
    layers_figure,
    save_figure,
    similarity_figure,
)
from spectra.plots.grouping import Comparison, curves_by_role, pages_by_layer, panels_by_role
from spectra.plots.heads import heads_figure
from spectra.plots.histogram import plot_histogram
from spectra.plots.interference import cosines_figure, depth_figure, draw_interference, plot_roles_over_depth
from spectra.plots.ranks import plot_kept_energy
from spectra.plots.scree import plot_scree
from spectra.plots.several import draw_pairs
from spectra.plots.similarity import grid_rows, plot_similarity
from spectra.plots.squares import pairs_figure, plot_square, squares_figure
from spectra.plots.stored import Drawn, draw_results

__all__ = [
    "Comparison",
    "DepthGrid",
    "Drawn",
    "cosines_figure",
    "curves_by_role",
    "depth_figure",
    "depth_grid",
    "draw_interference",
    "draw_pairs",
    "draw_panels",
    "draw_results",
    "grid_rows",
    "heads_figure",
    "histogram_figure",
    "histogram_panels",
    "layers_figure",
    "pages_by_layer",
    "pairs_figure",
    "panels_by_role",
    "plot_depth",
    "plot_histogram",
    "plot_kept_energy",
    "plot_roles_over_depth",
    "plot_scree",
    "plot_similarity",
    "plot_square",
    "save_figure",
    "similarity_figure",
    "squares_figure",
]
