"""Whole figures made of the axes-level plots, and how they are saved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import SelectionError
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots.depth import (
    DepthGrid,
    Kind,
    depth_grid,
    depth_table,
    draw_grid,
    ems_around,
    finding,
    put_title,
    value_range,
)
from spectra.plots.histogram import (
    BINS,
    LEAST_ROWS,
    LONGEST_NAME,
    ROW,
    BinnedPanel,
    bin_pooled,
    draw_binned,
    pool_curves,
)
from spectra.plots.panels import panelled, put_legend
from spectra.plots.places import place_of
from spectra.plots.similarity import add_colorbar, heading, plot_similarity
from spectra.plots.sizes import DEFAULT, Layout, arranged, size_of
from spectra.plots.style import look
from spectra.results.writing import write
from spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_USUAL = ("relative_norm", "norm", "stable_rank")  # the first where the base was read, else the second; and the third

CLOSE_UP = 0.05
FORMATS = ("png", "pdf", "svg")
DEFAULT_FORMATS = ("png", "pdf")
_MANY_PLACES = 12  # from which on pictures over depth are as wide as they may be
_HISTOGRAM = 27.0  # ems: of a panel with its curves' names
_AROUND_ROWS = 16.0  # ems above and below the curves' rows
_SQUARE, _BAR = 14.5, 5.5  # ems of a heatmap with its words, and of the colour bar
_LINE = 1.15  # ems of a line of small text
_DPI = 200  # of a png that is saved


def histogram_figure(
    spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]],
    *,
    title: str = "",
    bins: int = BINS,
    close_up: float = CLOSE_UP,
    size: str = DEFAULT,
) -> Figure:
    """The −ln σ histogram, whole and close-up side by side, one legend below.

    The left panel compares shapes, a row per curve (percent of its values): a bell, or a spike. The right one says
    how many values per matrix are at least as large as σ: the few strong directions of a spike come before the rest.

    Args:
        spectra: updates to pool, or label → updates for one curve each.
        title: above both panels.
        bins: per panel.
        close_up: share of min(out, in) values per matrix in the right panel's window, see `plot_histogram`.
        size: "column", "page" or "slide".

    Reference: Wang et al. 2023, Figs. 1 and 5.
    """
    return draw_panels(histogram_panels(spectra, bins=bins, close_up=close_up), title=title, size=size)


def histogram_panels(
    spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]], *, bins: int = BINS, close_up: float = CLOSE_UP
) -> tuple[BinnedPanel, BinnedPanel]:
    """The numbers of `histogram_figure`: its whole panel and its close-up, ready for `draw_panels`."""
    pooled = pool_curves(spectra)
    near = bin_pooled(pooled, bins=bins // 2, close_up=close_up, stat="at_least")
    return bin_pooled(pooled, bins=bins), near


def draw_panels(panels: Sequence[BinnedPanel], *, title: str = "", size: str = DEFAULT) -> Figure:
    """Panels of histograms side by side, or below each other where the size is narrow, with one legend below."""
    count = len(panels[0].curves)
    names = 0.5 * min(max(len(curve.values.label) for curve in panels[0].curves), LONGEST_NAME) + 2.0
    panel = (_HISTOGRAM, _AROUND_ROWS + ROW * max(count, LEAST_ROWS))
    layout = arranged(size, len(panels), panel, above=2.0 + _LINE * count, stretched=True)
    with panelled(layout, title=title) as (figure, axes):
        for binned, ax in zip(panels, axes, strict=True):
            draw_binned(binned, ax, width=layout.letters(1 - names / layout.panel))
        put_legend(figure, axes[-1], layout)
    return figure


def similarity_figure(
    similarities: Sequence[SubspaceSimilarity] | Mapping[str, SubspaceSimilarity | None],
    *,
    title: str = "",
    labels: tuple[str, str] | Mapping[str, tuple[str, str]] = ("first update", "second update"),
    columns: int | None = None,
    size: str = DEFAULT,
) -> Figure:
    """Several heatmaps of φ(i, j) under one colour scale.

    Args:
        similarities: panels in order, or title → panel; None leaves its place empty.
        title: above all panels.
        labels: what the two updates are, or panel's title → what they are there.
        columns: panels in a row; None for as many as the size holds, as even as they go.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: there is nothing to draw, a panel has no labels, or there are no columns.

    Reference: Wang et al. 2023, Fig. 4.
    """
    panels = _titled(similarities)
    drawn = [item for item in panels.values() if item is not None]
    if not drawn:
        raise SelectionError("there is no similarity to draw")
    if columns is not None and columns < 1:
        raise SelectionError(f"columns={columns} is not a positive number of panels in a row")
    width = int(_SQUARE / 0.5)
    lines = max(len(heading(item, name, width).splitlines()) for name, item in panels.items() if item is not None)
    panel = (_SQUARE, _SQUARE + _LINE * (lines + 2.5))
    layout = arranged(size, len(panels), panel, beside=_BAR, above=1.5 if title else 0.0, columns=columns)
    with panelled(layout, title=title, squares=True) as (figure, axes):
        for ax, (name, item) in zip(axes, panels.items(), strict=False):
            if item is not None:
                plot_similarity(item, title=name, labels=_pair(labels, name), width=width, colorbar=False, ax=ax)
        image = next(image for ax in axes for image in ax.images)
        add_colorbar(image, drawn, axes, shrink=1.8 / max(layout.rows, 2))
    return figure


def depth_figure(
    runs: Any, metrics: str | Sequence[str] = (), *, kind: Kind = "heatmap", title: str = "", size: str = DEFAULT
) -> Figure:
    """Metrics over layer × role: for one run a panel each, for several a column per run and a row per metric.

    Runs whose layers are called alike share their rows and columns, and all runs share the scale of each metric.

    Args:
        runs: what `plot_depth` takes, or label → what it takes.
        metrics: names of METRICS or columns; () for how large the update is (‖ΔW‖_F/‖W₀‖_F, or ‖ΔW‖_F where the base
            was not read) and for its stable rank.
        kind: as for `plot_depth`.
        title: above all panels.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: as for `plot_depth`.
    """
    return draw_depths(depth_grids(runs, metrics), kind=kind, title=title, size=size)


def draw_depths(
    grids: Mapping[tuple[str, str], DepthGrid], *, kind: Kind = "heatmap", title: str = "", size: str = DEFAULT
) -> Figure:
    """Draw the grids of `depth_grids`."""
    labels, metrics = ([*dict.fromkeys(key[place] for key in grids)] for place in (0, 1))
    layout = _depth_layout(grids, kind, size, len(labels), len(metrics), bool(title))
    limits = {metric: value_range([grids[label, metric] for label in labels]) for metric in metrics}
    with panelled(layout, title=title) as (figure, axes):
        for ax, (metric, label) in zip(axes, itertools.product(metrics, labels), strict=False):
            grid = grids[label, metric]
            has_bar = len(labels) == 1 or layout.columns == 1 or label == labels[-1]
            draw_grid(grid, ax, kind=kind, limits=limits[metric], colorbar=has_bar, width=layout.letters(0.75))
            above = finding(grid) if len(labels) == 1 else f"{label}\n{finding(grid)}"
            put_title(grid, ax, above, layout.letters(0.8))
    return figure


def _depth_layout(
    grids: Mapping[tuple[str, str], DepthGrid], kind: Kind, size: str, runs: int, metrics: int, titled: bool
) -> Layout:
    """Panels of one run stand where they fit; those of several beside each other, or all below each other."""
    rows = max(len(grid.rows) for grid in grids.values())
    places = max(len(grid.places) for grid in grids.values())
    names = 0.5 * min(max((len(row) for grid in grids.values() for row in grid.rows), default=0), 40)
    around = names + _BAR + 1.5 + (names if kind == "lines" else 0.0)
    width = around + min(max(0.8 * places, 11.0), size_of(size).widest - around)
    words = max(ems_around(grid, int(width)) for grid in grids.values())
    panel = (width, 8.0 + words + max(1.4 * rows, 8.0))
    options: Any = {"above": 2.0 if titled else 0.0, "stretched": places > _MANY_PLACES or metrics > 1}
    if runs == 1:
        return arranged(size, metrics, panel, most=metrics, **options)
    beside = arranged(size, runs * metrics, panel, columns=runs, **options)
    fits = beside.inches[0] <= size_of(size).width and beside.text >= 0.8 * size_of(size).text
    return beside if fits else arranged(size, runs * metrics, panel, columns=1, **options)


def depth_grids(runs: Any, metrics: str | Sequence[str] = ()) -> dict[tuple[str, str], DepthGrid]:
    """(run's label, metric) → the numbers of `depth_figure`: the same stacks have the same rows and columns."""
    metrics = [metrics] if isinstance(metrics, str) else metrics
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
    from spectra.plots.canvas import laid_out_once

    written = []
    check_formats(formats)
    with laid_out_once(figure, formats, _DPI) as drawn_once:
        for kind in formats:
            target = path.with_name(f"{path.name}.{kind}")
            metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
            drawn = BytesIO()  # whole before anything is written: a full disk ends matplotlib's writers in their errors
            with look():
                figure.savefig(drawn, format=kind, metadata=metadata, dpi=_DPI)
            drawn_once()
            write(target, drawn.getvalue(), lasting=False)
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
    drawn = BytesIO()
    with PdfPages(drawn, metadata={"CreationDate": None}) if "pdf" in formats else nullcontext() as book:
        for name, figure in pages:
            written += save_figure(figure, path.with_name(f"{path.name}-{name}"), single)
            if book is not None:
                with look():
                    book.savefig(figure)
    if "pdf" in formats:
        write(target, drawn.getvalue(), lasting=False)
        written.append(target)
    return written


def check_formats(formats: Sequence[str]) -> None:
    """Raise a SelectionError for a format that is not one of FORMATS."""
    for kind in formats:
        if kind not in FORMATS:
            raise SelectionError(f"{kind!r} is not one of the formats {', '.join(FORMATS)}")
