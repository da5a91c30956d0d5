"""`spectra plot`: redraw from stored results, several runs in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectra.cli import report
from spectra.cli.options import _LAYER

if TYPE_CHECKING:
    from spectra.types import Spectrum

_MOST_CURVES = 6
_LONGEST_LABEL = 28


@click.command("plot", short_help="Redraw figures from stored results.")
@click.argument("directories", nargs=-1, required=True, metavar="DIR…", type=click.Path())
@_LAYER
@click.option("--label", "labels", multiple=True, help="Name of a run in the legend, in order.  [default: its folder]")
@click.option(
    "--out", type=click.Path(file_okay=False), metavar="DIR", help="Where to put figures.  [default: first DIR]"
)
@click.option("--bins", type=click.IntRange(min=2), default=100, show_default=True, help="Bins of the histogram.")
@click.option("--per-layer", is_flag=True, help="One curve per layer instead of one per role or run.")
def command(
    directories: tuple[str, ...],
    layers: tuple[str, ...],
    labels: tuple[str, ...],
    out: str | None,
    bins: int,
    per_layer: bool,
) -> None:
    """Redraw the figures of stored results; nothing is computed again.

    One directory: a curve per role. Several directories, from svd: one curve each, on shared bins.
    Directories made by similarity: the heatmaps.
    """
    if labels and len(labels) != len(directories):
        raise click.UsageError(f"{len(labels)} labels for {len(directories)} directories: give one each or none")
    written = draw_directories(directories, out or directories[0], layers, labels, bins, per_layer)
    for path in written:
        click.echo(path)


def draw_directories(
    directories: Sequence[str],
    out: str,
    layers: Sequence[str] = (),
    labels: Sequence[str] = (),
    bins: int = 100,
    per_layer: bool = False,
    only: Sequence[str] | None = None,
) -> list[str]:
    """Draw whatever the directories hold, or of it the matrices of these names only, and say where it is."""
    from spectra.errors import SelectionError, StoreError
    from spectra.store import Store, StoredSpectra, load

    names = list(labels) or _short_names(directories)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    runs: dict[str, Sequence[Spectrum]] = {}
    for name, directory in zip(names, directories, strict=True):
        store = Store(directory)
        compared = store.similarities()
        if compared:
            inputs = store.run().get("inputs", {})
            labels_of = tuple(Path(inputs.get(key, f"update {key.upper()}")).name[:_LONGEST_LABEL] for key in "ab")
            written += _draw_similarity(compared, target if len(directories) == 1 else Path(directory), labels_of)
        if store.spectra.names():
            found = load(directory, vectors=False) if only is None else StoredSpectra(directory, only, vectors=False)
            runs[name] = found.select(list(layers)) if layers else found
        elif not compared:
            raise StoreError(f"{directory} holds no results; make them with spectra svd … --out {directory}")
    if not runs:
        return written
    try:
        return written + _draw_histogram(runs, target, bins, per_layer)
    except SelectionError as problem:
        report.note(f"no histogram: {problem}")
        return written


def _draw_histogram(runs: dict[str, Sequence[Spectrum]], target: Path, bins: int, per_layer: bool) -> list[str]:
    from spectra.plots import histogram_figure, save_figure

    title, curves = "", runs
    if len(runs) == 1:
        ((title, spectra),) = runs.items()
        curves, passed_over = _by_role(spectra, per_layer)
        if passed_over:
            report.note(f"not drawn, to keep the figure readable: {', '.join(passed_over)}; draw them with --layer")
    figure = histogram_figure(curves, title=title, bins=bins)
    return [str(path) for path in save_figure(figure, target / "histogram")]


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


def _draw_similarity(compared: Sequence, target: Path, labels: tuple[str, ...]) -> list[str]:
    from spectra.metrics.similarity import pool
    from spectra.plots import save_figure, similarity_figure

    groups: dict[str, list] = {}
    for item in compared:
        groups.setdefault(f"{item.role}, {item.side}", []).append(item)
    panels = {name: pool(items, name) if len(items) > 1 else items[0] for name, items in groups.items()}
    figure = similarity_figure(panels, labels=(labels[0], labels[1]))
    return [str(path) for path in save_figure(figure, target / "similarity")]


def _short_names(directories: Sequence[str]) -> list[str]:
    names = [Path(directory).resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else [str(directory) for directory in directories]
