"""`draw_results`: the figures of results directories, and the numbers behind each beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectra import naming
from spectra.errors import SelectionError
from spectra.metrics.similarity import SIDES, SubspaceSimilarity
from spectra.plots.energy import kept_energy_figure, kept_rows, scree_figure, scree_rows
from spectra.plots.figures import (
    CLOSE_UP,
    DEFAULT_FORMATS,
    check_formats,
    depth_grids,
    draw_depths,
    draw_panels,
    histogram_panels,
    save_pages,
    similarity_figure,
)
from spectra.plots.grouping import MOST_CURVES, Comparison, curves_by_role, pages_by_layer, panels_by_role
from spectra.plots.histogram import BINS, BinnedPanel
from spectra.plots.similarity import grid_rows
from spectra.plots.sizes import DEFAULT, size_of
from spectra.plots.tables import Drawn, Style, draw_tables, file_name, too_many
from spectra.results import tables
from spectra.results.collection import Spectra
from spectra.results.homes import home_of, nothing_stored
from spectra.results.store import Store
from spectra.results.writing import write
from spectra.spectrum import Spectrum

KINDS = ("histogram", "depth", "scree", "kept")  # figures of spectra
USUAL = ("histogram", "depth")
_LONGEST_LABEL = 28


def draw_results(
    directories: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    layers: str | Sequence[str] = (),
    names: Iterable[str] | None = None,
    sides: Sequence[str] = SIDES,
    labels: Sequence[str] = (),
    title: str = "",
    bins: int = BINS,
    close_up: float = CLOSE_UP,
    per_layer: bool = False,
    formats: Sequence[str] = DEFAULT_FORMATS,
    size: str = DEFAULT,
    kinds: Sequence[str] = USUAL,
    held: Iterable[Spectrum] = (),
) -> Drawn:
    """Draw whatever the directories hold; nothing is computed again.

    Of one directory of spectra: a histogram with a curve per role. Of several: a curve each, on shared bins.
    Beside it the size and the stable rank of the update over layer × role, a column per directory.
    Of comparisons: the heatmaps, a panel per directory, role and side; of one of several updates, every two of them. Of
    a series: its curves along training. Of an alignment: cosines and deciles. Of a verified merge: its verdicts. Of
    interference and of heads: cosines, and their numbers over the layers. The numbers behind each figure go into a csv
    file beside it.

    Args:
        directories: one or more, made by `decompose(…, out=…)`, `compare(…, out=…)`, `series(…, out=…)`, `save`, or
            by a command's --out.
        out: where to put figures; None for the first directory.
        layers: only the matrices that these patterns mean; () for all.
        names: only the matrices of these names, curves in their order; None for all.
        sides: which of the stored similarities.
        labels: what each directory is called in the figure; () for its folder's name.
        title: of the figures; "" for what their numbers say alone.
        bins: of the histogram.
        close_up: the share of min(out, in) values per matrix, the largest, in the histogram's close-up.
        per_layer: a curve per layer and role instead of one per role; more than a figure holds are pages of it.
        formats: what to write each figure as: "png", "pdf" or "svg".
        size: "column" or "page" for a paper, or "slide".
        kinds: which figures of spectra, of "histogram", "depth", "scree" (σ over its index) and "kept" (kept energy
            over parameters).
        held: spectra that one directory holds, by whoever has just stored or read them: they are not read again.

    Raises:
        StoreError: a directory holds no results, or out cannot be written to.
        SelectionError: labels do not fit the directories, a format, size or kind is unknown, or layers or sides mean
            nothing.
    """
    places = [directories] if isinstance(directories, str | Path) else list(directories)
    check_formats(formats)
    size_of(size)
    _check_kinds(kinds)
    style = Style(title, formats, size)
    called = run_labels(places, labels)
    wanted = None if names is None else list(dict.fromkeys(names))
    known = {spectrum.name: spectrum for spectrum in held}
    runs: dict[str, Spectra] = {}
    comparisons: list[Comparison] = []
    files, notes, rest = _of_tables(dict(zip(called, places, strict=True)), out, layers, sides, style)
    for label, directory in rest.items():
        store = _results(directory)
        try:
            if there := store.names():
                runs[label] = _chosen(store, there, layers, wanted, known)
            if store.similarity.names():
                comparisons.append(_comparison(label, store, layers, wanted, sides))
        except SelectionError as problem:
            raise SelectionError(f"{directory}: {problem}") from None
    target = home_of(places[0] if out is None else out)
    if comparisons:
        files += _draw_similarity(comparisons, target, bool(labels) or len(comparisons) > 1, style)
    drawers: dict[str, Callable[[], tuple[list[Path], list[str]]]] = {
        "histogram": lambda: _draw_values(runs, target, bins, close_up, per_layer, style),
        "depth": lambda: ([] if per_layer else _draw_depth(runs, target, style), []),
        "scree": lambda: _draw_scree(runs, target, style),
        "kept": lambda: _draw_kept(runs, target, style),
    }
    for kind in [kind for kind in KINDS if runs and kind in kinds]:
        drawn, more = _drawn(kind, drawers[kind])
        files, notes = [*files, *drawn], [*notes, *(line for line in more if line not in notes)]
    return Drawn(tuple(files), tuple(notes))


def _check_kinds(kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise SelectionError(f"{kind!r} is not one of the figures {', '.join(KINDS)} (kinds=, --kind)")


def _drawn(kind: str, draw: Callable[[], tuple[list[Path], list[str]]]) -> tuple[list[Path], list[str]]:
    """The files of one kind of figure and notes on it; where there is nothing to draw, the note says why."""
    try:
        return draw()
    except SelectionError as problem:
        return [], [f"no {kind}: {problem}"]


def _draw_values(
    runs: Mapping[str, Spectra], target: Path, bins: int, close_up: float, per_layer: bool, style: Style
) -> tuple[list[Path], list[str]]:
    """The histogram, and what does not fit into it."""
    if per_layer and len(runs) == 1:
        (spectra,) = runs.values()
        return _draw_pages(pages_by_layer(spectra.without_vectors()), target, bins, close_up, style), []
    curves, notes = _curves(runs)
    return _draw_histogram(curves, target, bins, close_up, style), notes


def _draw_scree(runs: Mapping[str, Spectra], target: Path, style: Style) -> tuple[list[Path], list[str]]:
    """σ over its index, and what does not fit."""
    curves, notes = _curves(runs)
    held = {label: list(spectra) for label, spectra in curves.items()}
    figure = scree_figure(held, title=style.title, size=style.size)
    return style.keep(figure, target / "scree", scree_rows(held), target / "scree.csv"), notes


def _draw_kept(runs: Mapping[str, Spectra], target: Path, style: Style) -> tuple[list[Path], list[str]]:
    """Kept energy over parameters, of whole updates."""
    whole = runs if len(runs) > 1 else {"": next(iter(runs.values()))}
    figure = kept_energy_figure(whole, title=style.title, size=style.size)
    return style.keep(figure, target / "kept", kept_rows(whole), target / "kept.csv"), []


def _of_tables(
    places: Mapping[str, str | Path],
    out: str | Path | None,
    layers: str | Sequence[str],
    sides: Sequence[str],
    style: Style,
) -> tuple[list[Path], list[str], dict[str, str | Path]]:
    """The figures of tables that directories hold, notes on them, and the directories that hold something else."""
    files: list[Path] = []
    notes: list[str] = []
    rest: dict[str, str | Path] = {}
    for label, directory in places.items():
        target = directory if out is None else out
        try:
            drawn = draw_tables(Path(directory), target, layers, sides, label if len(places) > 1 else "", style)
        except SelectionError as problem:
            raise SelectionError(f"{directory}: {problem}") from None
        store = Store(directory)
        if drawn is not None:
            files, notes = [*files, *drawn.files], [*notes, *drawn.notes]
        if drawn is None or not (store.spectra.is_empty and store.similarity.is_empty):
            rest[label] = directory
    return files, notes, rest


def run_labels(directories: Sequence[str | Path], labels: Sequence[str] = ()) -> list[str]:
    """What each directory is called in a figure: as given, or its folder's name, or its path where names repeat.

    Raises:
        SelectionError: there is not one label for each, or two are the same.
    """
    if labels and len(labels) != len(directories):
        raise SelectionError(f"{len(labels)} labels for {len(directories)} directories: give one each or none")
    folders = [Path(directory).resolve().name for directory in directories]
    unique = len(set(folders)) == len(folders)
    called = list(labels) or (folders if unique else [str(directory) for directory in directories])
    for name, count in Counter(called).items():
        if count > 1:
            raise SelectionError(f"{count} directories are called {name!r}: give each its own label (labels=, --label)")
    return called


def _results(directory: str | Path) -> Store:
    store = Store(directory)
    if store.spectra.is_empty and store.similarity.is_empty:
        raise nothing_stored(directory)
    return store


def _chosen(
    store: Store,
    there: Sequence[str],
    layers: str | Sequence[str],
    wanted: Sequence[str] | None,
    known: Mapping[str, Spectrum],
) -> Spectra:
    """The spectra to draw, each read once for all figures, or not at all where it is known."""
    stored = frozenset(there)
    names = there if wanted is None else [name for name in wanted if name in stored]
    chosen = naming.select(layers, names) if layers else names
    return Spectra(known[name] if name in known else store.get(name, vectors=False) for name in chosen)


def _comparison(
    label: str, store: Store, layers: str | Sequence[str], wanted: Sequence[str] | None, sides: Sequence[str]
) -> Comparison:
    asked = None if wanted is None else set(wanted)
    stored = [item for item in store.similarities() if asked is None or {item.name, item.title} & asked]
    chosen = set(naming.select(layers or "*", dict.fromkeys(item.name for item in stored)))
    on_side = [item for item in stored if item.side in sides]
    if not on_side:
        raise SelectionError(f"nothing is stored for side {sides[0]} (sides=, --side), only {stored[0].side}")
    return Comparison(label, _updates(store.run(), on_side[0]), [item for item in on_side if item.name in chosen])


def _updates(run: Mapping[str, Any], example: SubspaceSimilarity) -> tuple[str, str]:
    """What A and B were: the last folders of their paths in which they differ; within one update the two roles."""
    inputs = run.get("inputs", {})
    if example.other and inputs.get("a") is not None and inputs.get("a") == inputs.get("b"):
        return naming.role_of(example.name), naming.role_of(example.other)
    a, b = (Path(inputs.get(key) or f"update {key.upper()}") for key in "ab")
    while a.name == b.name and a.parent.name and b.parent.name:
        a, b = a.parent, b.parent
    return _shortened(a.name), _shortened(b.name)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _curves(runs: Mapping[str, Spectra]) -> tuple[Mapping[str, Iterable[Any]], list[str]]:
    """The histogram's curves, and what does not fit."""
    if len(runs) > 1:
        return runs, []
    (spectra,) = runs.values()
    curves, left_out = curves_by_role(spectra)
    return curves, list(too_many(left_out))


def _draw_histogram(
    curves: Mapping[str, Iterable[Any]], target: Path, bins: int, close_up: float, style: Style
) -> list[Path]:
    panels = histogram_panels(curves, bins=bins, close_up=close_up)
    numbers = [row for panel in panels for row in panel.rows()]
    figure = draw_panels(panels, title=style.title, size=style.size)
    return style.keep(figure, target / "histogram", numbers, target / "histogram.csv")


def _draw_depth(runs: Mapping[str, Spectra], target: Path, style: Style) -> list[Path]:
    """The size and the stable rank over depth; nothing where all matrices lie in one layer."""
    grids = depth_grids(runs)
    if all(len(grid.places) < 2 or not grid.numbers.any() for grid in grids.values()):
        return []
    numbers = [{"run": label, **cell} for (label, _), grid in grids.items() for cell in grid.cells()]
    figure = draw_depths(grids, title=style.title, size=style.size)
    return style.keep(figure, target / "depth", numbers, target / "depth.csv")


def _draw_pages(
    pages: Mapping[str, Mapping[str, list[Any]]], target: Path, bins: int, close_up: float, style: Style
) -> list[Path]:
    """A figure per page, all on the same bins, so that they can be laid over each other; one table of all."""
    curves = {label: spectra for page in pages.values() for label, spectra in page.items()}
    if len(curves) <= MOST_CURVES:
        return _draw_histogram(curves, target, bins, close_up, style)
    panels = histogram_panels(curves, bins=bins, close_up=close_up)
    table = target / "histogram.csv"
    write(table, tables.to_csv([row for panel in panels for row in panel.rows()]).encode())
    drawn = ((name, panels_of(panels, labels)) for name, labels in pages.items())
    before = f"{style.title}: " if style.title else ""
    figures = (
        (file_name(name), draw_panels(some, title=before + name, size=style.size)) for name, some in drawn if some
    )
    return [*save_pages(figures, target / "histogram", style.formats), table]


def panels_of(panels: Sequence[BinnedPanel], labels: Iterable[str]) -> list[BinnedPanel]:
    """The same panels with only these curves; none where none of them has a value to draw."""
    kept = set(labels)
    some = [replace(panel, curves=tuple(c for c in panel.curves if c.values.label in kept)) for panel in panels]
    return some if some[0].curves else []


def _draw_similarity(comparisons: Sequence[Comparison], target: Path, named: bool, style: Style) -> list[Path]:
    panels = panels_by_role(comparisons, named=named)
    figure = similarity_figure(
        panels.similarities, title=style.title, labels=panels.labels, columns=panels.columns, size=style.size
    )
    # similarity.csv is the table of the comparison itself
    numbers = grid_rows(panels.similarities)
    return style.keep(figure, target / "similarity", numbers, target / "similarity_grid.csv")
