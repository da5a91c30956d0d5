"""`spectra plot`: redraw from stored results, several runs in one figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.options import _LAYER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spectra.metrics.similarity import SubspaceSimilarity
    from spectra.spectrum import Spectrum

_BINS = 100
_CLOSE_UP = 0.05
_MOST_CURVES = 7  # as many as there are colours, and linear layers in a LLaMA block
_LONGEST_LABEL = 28


@dataclass(frozen=True)
class _Comparison:
    """What `spectra similarity --out` stored: its label, what A and B were, and the matrices by role and side."""

    label: str
    updates: tuple[str, str]
    groups: dict[tuple[str, str], list[SubspaceSimilarity]]


@click.command("plot", short_help="Redraw figures from stored results.")
@click.argument("directories", nargs=-1, required=True, metavar="DIR…", type=click.Path())
@_LAYER
@click.option("--label", "labels", multiple=True, help="Name of a DIR in the figure, in order.  [default: its folder]")
@click.option("--title", default="", metavar="TEXT", help="Title of the figure.  [default: a single run's label]")
@click.option(
    "--out", type=click.Path(file_okay=False), metavar="DIR", help="Where to put figures.  [default: first DIR]"
)
@click.option("--bins", type=click.IntRange(min=2), default=_BINS, show_default=True, help="Bins of the histogram.")
@click.option("--close-up", type=click.FloatRange(min=0, max=1, min_open=True), default=_CLOSE_UP, show_default=True,
              metavar="SHARE", help="Share of the values, the largest, that the close-up shows.")  # fmt: skip
@click.option("--side", type=click.Choice(["left", "right", "both"]), default="both", show_default=True,
              help="Which stored similarities.")  # fmt: skip
@click.option("--per-layer", is_flag=True, help="One curve per layer instead of one per role or run.")
def command(
    directories: tuple[str, ...],
    layers: tuple[str, ...],
    labels: tuple[str, ...],
    title: str,
    out: str | None,
    bins: int,
    close_up: float,
    side: str,
    per_layer: bool,
) -> None:
    """Redraw the figures of stored results; nothing is computed again.

    One directory: a curve per role. Several directories, from svd: one curve each, on shared bins.
    Directories made by similarity: the heatmaps, a panel per directory, role and side.
    The numbers behind each figure go into a csv file beside it.
    """
    if labels and len(labels) != len(directories):
        raise click.UsageError(f"{len(labels)} labels for {len(directories)} directories: give one each or none")
    for name, count in Counter(labels or _short_names(directories)).items():
        if count > 1:
            raise click.UsageError(f"{count} directories are called {name!r}: give each its own --label")
    written = draw_directories(
        directories,
        out or directories[0],
        layers,
        labels,
        sides=("left", "right") if side == "both" else (side,),
        title=title,
        bins=bins,
        close_up=close_up,
        per_layer=per_layer,
    )
    for path in written:
        click.echo(path)


def draw_directories(
    directories: Sequence[str],
    out: str,
    layers: Sequence[str] = (),
    labels: Sequence[str] = (),
    *,
    sides: Sequence[str] = ("left", "right"),
    title: str = "",
    bins: int = _BINS,
    close_up: float = _CLOSE_UP,
    per_layer: bool = False,
    only: Sequence[str] | None = None,
) -> list[str]:
    """Draw whatever the directories hold, with the numbers beside each figure, and say where it is.

    `only` draws, of spectra, the matrices of these names.
    """
    from spectra.errors import SelectionError

    names = list(labels) or _short_names(directories)
    runs, compared = _stored(directories, names, layers, sides, only)
    target = Path(out)
    written: list[str] = []
    if compared:
        written += _draw_similarity(compared, target, title, named=bool(labels) or len(compared) > 1)
    if runs:
        try:
            written += _draw_histogram(runs, target, title, bins, close_up, per_layer)
        except SelectionError as problem:
            report.note(f"no histogram: {problem}")
    return written


def _stored(
    directories: Sequence[str],
    names: Sequence[str],
    layers: Sequence[str],
    sides: Sequence[str],
    only: Sequence[str] | None,
) -> tuple[dict[str, Sequence[Spectrum]], list[_Comparison]]:
    """The spectra and the comparisons that the directories hold, as far as --layer and --side mean them."""
    from spectra import naming
    from spectra.errors import SelectionError, StoreError
    from spectra.results.store import Store, StoredSpectra

    runs: dict[str, Sequence[Spectrum]] = {}
    compared: list[_Comparison] = []
    for name, directory in zip(names, directories, strict=True):
        store = Store(directory)
        spectra, found = StoredSpectra(directory, only, vectors=False), store.similarities()
        if not store.spectra.names() and not found:
            raise StoreError(f"{directory} holds no results; make them with spectra svd … --out {directory}")
        try:
            if store.spectra.names():
                runs[name] = spectra.select(list(layers)) if layers else spectra
            if found:
                chosen = naming.select(list(layers) or "*", dict.fromkeys(item.name for item in found))
                on_side = [item for item in found if item.side in sides]
                if not on_side:
                    raise SelectionError(f"nothing is stored for --side {sides[0]}, only {found[0].side}")
                compared.append(_Comparison(name, _updates(store.run()), _grouped(on_side, set(chosen))))
        except SelectionError as problem:
            raise SelectionError(f"{directory}: {problem}") from None
    return runs, compared


def _grouped(
    found: Sequence[SubspaceSimilarity], chosen: Container[str]
) -> dict[tuple[str, str], list[SubspaceSimilarity]]:
    groups: dict[tuple[str, str], list[SubspaceSimilarity]] = {}
    for item in found:
        if item.name in chosen:
            groups.setdefault((item.role, item.side), []).append(item)
    return groups


def _updates(run: dict[str, Any]) -> tuple[str, str]:
    """What A and B were, by the last folders of their paths in which they differ."""
    inputs = run.get("inputs", {})
    a, b = (Path(inputs.get(key) or f"update {key.upper()}") for key in "ab")
    while a.name == b.name and a.parent.name and b.parent.name:
        a, b = a.parent, b.parent
    return _shortened(a.name), _shortened(b.name)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _draw_histogram(
    runs: dict[str, Sequence[Spectrum]], target: Path, title: str, bins: int, close_up: float, per_layer: bool
) -> list[str]:
    from spectra.plots import draw_panels, histogram_panels

    curves = runs
    if len(runs) == 1:
        ((name, spectra),) = runs.items()
        curves, passed_over = _by_role(spectra, per_layer)
        title = title or name
        if passed_over:
            report.note(f"not drawn, to keep the figure readable: {', '.join(passed_over)}; draw them with --layer")
    panels = histogram_panels(curves, bins=bins, close_up=close_up)
    numbers = [row for panel in panels for row in panel.rows()]
    return _keep(draw_panels(panels, title=title), target / "histogram", numbers, target / "histogram.csv")


def _by_role(spectra: Sequence[Spectrum], per_layer: bool) -> tuple[dict[str, Sequence[Spectrum]], list[str]]:
    """A curve per role, or per role and layer: those with the most values, and the names of the others."""
    groups: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        layer = "" if spectrum.layer is None else f", layer {spectrum.layer}"
        groups.setdefault(spectrum.role + (layer if per_layer else ""), []).append(spectrum)
    sizes = {name: sum(item.rank for item in items) for name, items in groups.items()}
    kept = set(sorted(groups, key=lambda name: -sizes[name])[:_MOST_CURVES])
    passed_over = [name for name in groups if name not in kept]
    return {name: items for name, items in groups.items() if name in kept}, passed_over


def _draw_similarity(compared: Sequence[_Comparison], target: Path, title: str, named: bool) -> list[str]:
    """One figure: a row of panels per role and side, in each the directories in their order."""
    from spectra.metrics.similarity import SIDES, pool
    from spectra.plots import grid_rows, similarity_figure

    there = dict.fromkeys(group for comparison in compared for group in comparison.groups)
    roles = dict.fromkeys(role for role, _ in there)
    rows = [(role, side) for role in roles for side in SIDES if (role, side) in there]
    one_side = len({side for _, side in rows}) == 1
    panels: dict[str, SubspaceSimilarity | None] = {}
    labels: dict[str, tuple[str, str]] = {}
    for role, side in rows:
        for comparison in compared:
            what = role if named and one_side else f"{role}, {side}"
            name = f"{comparison.label}: {what}" if named else what
            found = comparison.groups.get((role, side), [])
            panels[name] = pool(found, name) if len(found) > 1 else found[0] if found else None
            labels[name] = comparison.updates
    columns = len(compared) if len(rows) > 1 and len(compared) > 1 else None
    figure = similarity_figure(panels, title=title, labels=labels, columns=columns)
    # similarity.csv is the table of the comparison itself
    return _keep(figure, target / "similarity", grid_rows(panels), target / "similarity_grid.csv")


def _keep(figure: Figure, path: Path, rows: list[dict[str, Any]], table: Path) -> list[str]:
    """Save a figure and the numbers that it shows."""
    from spectra.plots import save_figure
    from spectra.results import tables
    from spectra.results.store import write

    write(table, tables.to_csv(rows).encode())  # makes the directory, too
    return [str(written) for written in [*save_figure(figure, path), table]]


def _short_names(directories: Sequence[str]) -> list[str]:
    names = [Path(directory).resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else [str(directory) for directory in directories]
