"""Pictures: axes-level functions that take `ax` and return it, and the figures made of them."""

from __future__ import annotations

from spectra.plots.alignment import deciles_figure, plot_cosines, plot_deciles, tops_figure
from spectra.plots.depth import DepthGrid, depth_grid, plot_depth
from spectra.plots.energy import kept_energy_figure, scree_figure
from spectra.plots.figures import (
    depth_figure,
    draw_panels,
    histogram_figure,
    histogram_panels,
    save_figure,
    similarity_figure,
)
from spectra.plots.grouping import Comparison, curves_by_role, pages_by_layer, panels_by_role
from spectra.plots.heads import heads_figure
from spectra.plots.histogram import plot_histogram
from spectra.plots.interference import cosines_figure, draw_interference, plot_roles_over_depth, roles_over_depth_figure
from spectra.plots.ranks import plot_kept_energy
from spectra.plots.scree import plot_scree
from spectra.plots.series import plot_series, series_figure
from spectra.plots.several import draw_pairs
from spectra.plots.similarity import grid_rows, plot_similarity
from spectra.plots.squares import pairs_figure, plot_square, squares_figure
from spectra.plots.stored import draw_results
from spectra.plots.tables import Drawn
from spectra.plots.verdicts import verdicts_figure

__all__ = [
    "Comparison",
    "DepthGrid",
    "Drawn",
    "cosines_figure",
    "curves_by_role",
    "deciles_figure",
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
    "kept_energy_figure",
    "pages_by_layer",
    "pairs_figure",
    "panels_by_role",
    "plot_cosines",
    "plot_deciles",
    "plot_depth",
    "plot_histogram",
    "plot_kept_energy",
    "plot_roles_over_depth",
    "plot_scree",
    "plot_series",
    "plot_similarity",
    "plot_square",
    "roles_over_depth_figure",
    "save_figure",
    "scree_figure",
    "series_figure",
    "similarity_figure",
    "squares_figure",
    "tops_figure",
    "verdicts_figure",
]
