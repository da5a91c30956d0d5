"""Whole figures made of the axes-level plots, and how they are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.errors import SelectionError, StoreError
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots.histogram import BINS, draw_pooled, pool_values
from spectra.plots.similarity import add_colorbar, caption, plot_similarity
from spectra.plots.style import look
from spectra.types import Spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOSE_UP = 0.05
_COLUMNS = 3


def histogram_figure(
    spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]],
    *,
    title: str = "",
    bins: int = BINS,
    close_up: float = CLOSE_UP,
) -> Figure:
    """The −ln σ histogram, whole and close-up side by side, one legend below.

    The left panel compares shapes (percent of each curve), the right one counts the largest values
    per matrix, where updates of different rank compete for the same place.

    Args:
        spectra: updates to pool, or label → updates for one curve each.
        title: above both panels.
        bins: per panel.
        close_up: share of the values in the right panel's window, see `plot_histogram`.

    Reference: Wang et al. 2023, Figs. 1 and 5.
    """
    from matplotlib.figure import Figure

    curves_of = spectra if isinstance(spectra, Mapping) else {"": spectra}
    pooled = [pool_values(items, label) for label, items in curves_of.items()]
    with look():
        figure = Figure(figsize=(10.0, 4.4), layout="constrained")
        whole, near = figure.subplots(1, 2)
        draw_pooled(pooled, bins=bins, ax=whole)
        draw_pooled(pooled, bins=bins // 2, close_up=close_up, stat="per_matrix", ax=near)
        if title:
            figure.suptitle(title)
        figure.legend(
            *whole.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=1 if len(pooled) <= _COLUMNS else 2,
            fontsize=9,
        )
    return figure


def similarity_figure(
    similarities: Sequence[SubspaceSimilarity] | Mapping[str, SubspaceSimilarity],
    *,
    title: str = "",
    labels: tuple[str, str] = ("first update", "second update"),
) -> Figure:
    """Several heatmaps of φ(i, j) under one colour scale.

    Args:
        similarities: panels in order, or title → panel.
        title: above all panels.
        labels: what the two updates are.

    Raises:
        SelectionError: there is nothing to draw.

    Reference: Wang et al. 2023, Fig. 4.
    """
    from matplotlib.figure import Figure

    panels = dict(similarities) if isinstance(similarities, Mapping) else {item.name: item for item in similarities}
    if not isinstance(similarities, Mapping) and len(panels) < len(similarities):
        panels = {f"{item.name}, {item.side}": item for item in similarities}
    if not panels:
        raise SelectionError("there is no similarity to draw")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with look():
        lines = 1 + max(len(caption(item).splitlines()) for item in panels.values())
        height = (3.7 + 0.17 * lines) * rows + (0.3 if title else 0)
        figure = Figure(figsize=(3.9 * columns + 0.9, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        axes = list(grid.flat)
        for ax, (name, item) in zip(axes, panels.items(), strict=False):
            plot_similarity(item, title=name, labels=labels, colorbar=False, ax=ax)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        add_colorbar(axes[0].images[0], list(panels.values()), axes)
        if title:
            figure.suptitle(title)
    return figure


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write the figure beside `path` in each format, by name: `histogram.png`, `histogram.pdf`.

    Raises:
        StoreError: it cannot be written.
    """
    written = []
    for kind in formats:
        target = path.with_name(f"{path.name}.{kind}")
        metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
        try:
            with look():
                figure.savefig(target, metadata=metadata, dpi=200)
        except OSError as problem:
            raise StoreError(f"{target} cannot be written ({problem.strerror}); choose another --out") from None
        written.append(target)
    return written
