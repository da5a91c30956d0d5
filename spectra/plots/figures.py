"""Whole figures made of the axes-level plots, and how they are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.errors import SelectionError, StoreError
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots.histogram import BINS, BinnedPanel, bin_pooled, draw_binned, pool_curves
from spectra.plots.similarity import add_colorbar, heading, plot_similarity
from spectra.plots.style import look
from spectra.printing import in_figure
from spectra.results.shelf import ANOTHER_PLACE
from spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOSE_UP = 0.05
FORMATS = ("png", "pdf", "svg")
DEFAULT_FORMATS = ("png", "pdf")
_COLUMNS = 3
_LEGEND_WIDTH = 72  # characters that fit twice beside each other
_PANEL = 3.0  # inches: three in a row are legible across a printed page
_WIDTH = 38  # characters over such a panel


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
        close_up: share of min(out, in) values per matrix in the right panel's window, see `plot_histogram`.

    Reference: Wang et al. 2023, Figs. 1 and 5.
    """
    return draw_panels(histogram_panels(spectra, bins=bins, close_up=close_up), title=title)


def histogram_panels(
    spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]], *, bins: int = BINS, close_up: float = CLOSE_UP
) -> tuple[BinnedPanel, BinnedPanel]:
    """The numbers of `histogram_figure`: its whole panel and its close-up, ready for `draw_panels`."""
    pooled = pool_curves(spectra)
    near = bin_pooled(pooled, bins=bins // 2, close_up=close_up, stat="per_matrix")
    return bin_pooled(pooled, bins=bins), near


def draw_panels(panels: Sequence[BinnedPanel], *, title: str = "") -> Figure:
    """Panels of histograms side by side, with the first one's legend below."""
    from spectra.plots.canvas import ShownFigure

    with look():
        figure = ShownFigure(figsize=(5.0 * len(panels), 4.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, ax in zip(panels, axes, strict=True):
            draw_binned(panel, ax)
        if title:
            figure.suptitle(in_figure(title), wrap=True)
        handles, labels = axes[0].get_legend_handles_labels()
        one_column = len(panels[0].curves) <= _COLUMNS or max(map(len, labels)) > _LEGEND_WIDTH
        figure.legend(handles, labels, loc="outside lower center", ncols=1 if one_column else 2, fontsize=9)
    return figure


def similarity_figure(
    similarities: Sequence[SubspaceSimilarity] | Mapping[str, SubspaceSimilarity | None],
    *,
    title: str = "",
    labels: tuple[str, str] | Mapping[str, tuple[str, str]] = ("first update", "second update"),
    columns: int | None = None,
) -> Figure:
    """Several heatmaps of φ(i, j) under one colour scale.

    Args:
        similarities: panels in order, or title → panel; None leaves its place empty.
        title: above all panels.
        labels: what the two updates are, or panel's title → what they are there.
        columns: panels in a row; None for rows of at most three, as even as they go.

    Raises:
        SelectionError: there is nothing to draw, a panel has no labels, or there are no columns.

    Reference: Wang et al. 2023, Fig. 4.
    """
    from spectra.plots.canvas import ShownFigure

    panels = _titled(similarities)
    drawn = [item for item in panels.values() if item is not None]
    if not drawn:
        raise SelectionError("there is no similarity to draw")
    if columns is not None and columns < 1:
        raise SelectionError(f"columns={columns} is not a positive number of panels in a row")
    columns = columns or math.ceil(len(panels) / math.ceil(len(panels) / _COLUMNS))
    rows = math.ceil(len(panels) / columns)
    lines = max(len(heading(item, name, _WIDTH).splitlines()) for name, item in panels.items() if item is not None)
    with look():
        height = (_PANEL - 0.1 + 0.17 * lines) * rows + (0.3 if title else 0)
        figure = ShownFigure(figsize=(_PANEL * columns + 0.9, height), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, (name, item) in zip(axes, panels.items(), strict=False):
            if item is not None:
                plot_similarity(item, title=name, labels=_pair(labels, name), width=_WIDTH, colorbar=False, ax=ax)
        for ax in axes:
            ax.set_visible(bool(ax.images))
        add_colorbar(next(image for ax in axes for image in ax.images), drawn, axes, shrink=1.8 / max(rows, 2))
        if title:
            figure.suptitle(in_figure(title), wrap=True)
    return figure


def _titled(
    similarities: Sequence[SubspaceSimilarity] | Mapping[str, SubspaceSimilarity | None],
) -> dict[str, SubspaceSimilarity | None]:
    if isinstance(similarities, Mapping):
        return dict(similarities)
    panels: dict[str, SubspaceSimilarity | None] = {item.name: item for item in similarities}
    return panels if len(panels) == len(similarities) else {f"{item.name}, {item.side}": item for item in similarities}


def _pair(labels: tuple[str, str] | Mapping[str, tuple[str, str]], name: str) -> tuple[str, str]:
    if not isinstance(labels, Mapping):
        return labels
    if name not in labels:
        raise SelectionError(f"labels has no pair for the panel {name!r}; it has {', '.join(map(repr, labels))}")
    return labels[name]


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = DEFAULT_FORMATS) -> list[Path]:
    """Write the figure beside `path` in each format, by name: `histogram.png`, `histogram.pdf`.

    Raises:
        SelectionError: a format is not one of FORMATS.
        StoreError: it cannot be written.
    """
    written = []
    check_formats(formats)
    for kind in formats:
        target = path.with_name(f"{path.name}.{kind}")
        metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
        try:
            with look():
                figure.savefig(target, metadata=metadata, dpi=200)
        except OSError as problem:
            raise StoreError(f"{target} cannot be written ({problem.strerror}); choose {ANOTHER_PLACE}") from None
        written.append(target)
    return written


def save_pages(pages: Iterable[tuple[str, Figure]], path: Path, formats: Sequence[str] = DEFAULT_FORMATS) -> list[Path]:
    """Write figures that are the pages of one: a pdf of all, in the other formats `histogram-NAME.png` each.

    Args:
        pages: name → figure, one at a time.
        path: as for `save_figure`.
        formats: as for `save_figure`.

    Raises:
        SelectionError: a format is not one of FORMATS.
        StoreError: a file cannot be written.
    """
    from matplotlib.backends.backend_pdf import PdfPages

    check_formats(formats)
    target = path.with_name(f"{path.name}.pdf")
    single = [kind for kind in formats if kind != "pdf"]
    written: list[Path] = []
    try:
        with PdfPages(target, metadata={"CreationDate": None}) if "pdf" in formats else nullcontext() as book:
            for name, figure in pages:
                written += save_figure(figure, path.with_name(f"{path.name}-{name}"), single)
                if book is not None:
                    with look():
                        book.savefig(figure)
    except OSError as problem:
        raise StoreError(f"{target} cannot be written ({problem.strerror}); choose {ANOTHER_PLACE}") from None
    return [*written, *([target] if "pdf" in formats else [])]


def check_formats(formats: Sequence[str]) -> None:
    """Raise a SelectionError for a format that is not one of FORMATS."""
    for kind in formats:
        if kind not in FORMATS:
            raise SelectionError(f"{kind!r} is not one of the formats {', '.join(FORMATS)}")
