"""Whole figures made of the axes-level plots, and how they are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import SelectionError, StoreError
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots.depth import DepthGrid, Kind, depth_grid, depth_table, draw_grid, finding, put_title, value_range
from spectra.plots.histogram import BINS, BinnedPanel, bin_pooled, draw_binned, pool_curves
from spectra.plots.places import place_of
from spectra.plots.similarity import add_colorbar, heading, plot_similarity
from spectra.plots.style import look
from spectra.printing import in_figure
from spectra.results.shelf import ANOTHER_PLACE
from spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_USUAL = ("relative_norm", "norm", "stable_rank")  # the first where the base was read, else the second; and the third

CLOSE_UP = 0.05
FORMATS = ("png", "pdf", "svg")
DEFAULT_FORMATS = ("png", "pdf")
_COLUMNS = 3
_ROW = 0.42  # inches of a curve's row
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

    The left panel compares shapes, a row per curve (percent of its values): a bell, or a spike. The right one says
    how many values per matrix are at least as large as σ: the few strong directions of a spike come before the rest.

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
    near = bin_pooled(pooled, bins=bins // 2, close_up=close_up, stat="at_least")
    return bin_pooled(pooled, bins=bins), near


def draw_panels(panels: Sequence[BinnedPanel], *, title: str = "") -> Figure:
    """Panels of histograms side by side, with the last one's legend below."""
    from spectra.plots.canvas import ShownFigure

    with look():
        height = 3.2 + _ROW * max(len(panels[0].curves), 2)
        figure = ShownFigure(figsize=(5.4 * len(panels), height), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, ax in zip(panels, axes, strict=True):
            draw_binned(panel, ax)
        if title:
            figure.suptitle(in_figure(title), wrap=True)
        handles, labels = axes[-1].get_legend_handles_labels()
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


def depth_figure(runs: Any, metrics: Sequence[str] = (), *, kind: Kind = "heatmap", title: str = "") -> Figure:
    """Metrics over layer × role: for one run a panel each, for several a column per run and a row per metric.

    Runs whose layers are called alike share their rows and columns, and all runs share the scale of each metric.

    Args:
        runs: what `plot_depth` takes, or label → what it takes.
        metrics: names of METRICS or columns; () for how large the update is (‖ΔW‖_F/‖W₀‖_F, or ‖ΔW‖_F where the base
            was not read) and for its stable rank.
        kind: as for `plot_depth`.
        title: above all panels.

    Raises:
        SelectionError: as for `plot_depth`.
    """
    return draw_depths(depth_grids(runs, metrics), kind=kind, title=title)


def draw_depths(grids: Mapping[tuple[str, str], DepthGrid], *, kind: Kind = "heatmap", title: str = "") -> Figure:
    """Draw the grids of `depth_grids`."""
    from spectra.plots.canvas import ShownFigure

    labels, metrics = ([*dict.fromkeys(key[place] for key in grids)] for place in (0, 1))
    one_run = len(labels) == 1
    most_rows = max(len(grid.rows) for grid in grids.values())
    most_places = max(len(grid.places) for grid in grids.values())
    width = 2.4 + min(max(0.24 * most_places, 2.4), 9.0) + (1.2 if kind == "lines" else 0)
    height = 1.3 + max(0.26 * most_rows, 1.2)
    rows, columns = (1, len(metrics)) if one_run else (len(metrics), len(labels))
    with look():
        figure = ShownFigure(figsize=(width * columns, height * rows + (0.3 if title else 0)), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for place, metric in enumerate(metrics):
            limits = value_range([grids[label, metric] for label in labels])
            for column, label in enumerate(labels):
                ax, grid = axes.T[place, 0] if one_run else axes[place, column], grids[label, metric]
                last, characters = column == len(labels) - 1, int(9 * width)
                draw_grid(grid, ax, kind=kind, limits=limits, colorbar=last or one_run, width=characters)
                above = finding(grid) if one_run else f"{label}\n{finding(grid)}"
                put_title(grid, ax, above, characters, fontsize=9)
        if title:
            figure.suptitle(in_figure(title), wrap=True)
    return figure


def depth_grids(runs: Any, metrics: Sequence[str] = ()) -> dict[tuple[str, str], DepthGrid]:
    """(run's label, metric) → the numbers of `depth_figure`: the same stacks have the same rows and columns."""
    labelled: Mapping[str, Any] = runs if isinstance(runs, Mapping) else {"": runs}
    read = {label: depth_table(run, metrics or _USUAL) for label, run in labelled.items()}
    names = {label: [str(row.get("name")) for row in rows] for label, rows in read.items()}
    stacks = {label: {place_of(name).stack for name in own} - {""} for label, own in names.items()}
    like = {
        label: [name for other, theirs in names.items() if not stacks[other].isdisjoint(own) for name in theirs]
        for label, own in stacks.items()
    }
    chosen = metrics or [_USUAL[0] if _has(read.values(), _USUAL[0]) else _USUAL[1], _USUAL[2]]
    return {
        (label, metric): depth_grid(rows, metric, like=like[label]) for metric in chosen for label, rows in read.items()
    }


def _has(tables: Iterable[Sequence[Mapping[str, Any]]], metric: str) -> bool:
    return any(row.get(metric, math.nan) == row.get(metric, math.nan) for rows in tables for row in rows)


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
