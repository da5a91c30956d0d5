"""`spectra similarity`: do two updates use the same directions?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.options import compute_options, executor_for, result_options, source_options

if TYPE_CHECKING:
    from spectra.metrics.similarity import SubspaceSimilarity
    from spectra.results.comparison import NotCompared

_MOST_LINES = 12


@click.command("similarity", short_help="Do two updates use the same directions?")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--base", metavar="BASE", help="The model both started from, where the formats need it.")
@click.option(
    "--top", type=click.IntRange(min=1), default=30, show_default=True, metavar="K", help="How many directions."
)
@click.option("--side", type=click.Choice(["left", "right", "both"]), default="left", show_default=True,
              help="Left singular vectors (out), right ones (in), or both.")  # fmt: skip
@source_options
@compute_options
@result_options
def command(
    a: str,
    b: str,
    base: str | None,
    top: int,
    side: str,
    layers: tuple[str, ...],
    heads: str | int,
    scale: float | None,
    split: bool,
    device: str,
    workers: int | None,
    cluster: str | None,
    memory: str | None,
    out: str | None,
    figures: bool,
    as_json: bool,
) -> None:
    """Subspace similarity φ(i, j) of two updates, matrix by matrix, with its chance level.

    A and B are tuned models, adapters, or directories that `spectra svd --top K --out` made.
    """
    from spectra.results.comparison import NotCompared

    sides = ("left", "right") if side == "both" else (side,)
    settings = {"heads": heads, "scale": scale, "split": split}
    with executor_for(workers, cluster) as executor:
        compute = {"device": device, "executor": executor, "memory_budget": memory}
        inputs, total, order, found = _compare(a, b, base, layers, settings, top, sides, compute, out)
        done: list[SubspaceSimilarity] = []
        undone: list[NotCompared] = []
        with report.progress(total, "spectra similarity") as bar:
            for item in found:
                bar.update()
                if isinstance(item, NotCompared):
                    undone.append(item)
                else:
                    done.append(item)
    done.sort(key=lambda item: order[item.name])  # they come as they finish
    written = _draw(out, done) if out and figures and done else []
    if as_json:
        report.print_json(_document(inputs, done, undone))
    else:
        _print(done)
    _close(done, undone, out, written)


def _compare(
    a: str,
    b: str,
    base: str | None,
    layers: tuple[str, ...],
    settings: dict[str, Any],
    top: int,
    sides: tuple[Any, ...],
    compute: dict[str, Any],
    out: str | None,
) -> tuple[dict[str, Any], int, dict[str, int], Iterator[SubspaceSimilarity | NotCompared]]:
    """What is compared, how many comparisons that makes, each matrix's place, and the stream."""
    from spectra.results import resume as runs
    from spectra.results.store import load
    from spectra.sources import open_source

    stored = [Path(path, "run.json").is_file() for path in (a, b)]
    inputs: dict[str, Any] = {"kind": "similarity", "a": str(a), "b": str(b), "base": base, "options": settings}
    if all(stored):
        loaded = [load(path) for path in (a, b)]
        loaded = [run.select(layers) for run in loaded] if layers else loaded
        total, order = _count([run.names for run in loaded], sides)
        one, other = loaded
        return inputs, total, order, runs.compare_stored_into(out, one, other, inputs, top=top, sides=sides)
    if any(stored):
        raise click.UsageError("one of A and B holds stored results and the other weights: give two of a kind")
    sources = [open_source(path, base, **settings) for path in (a, b)]
    sources = [source.select(layers) for source in sources] if layers else sources
    for source in sources:
        report.coverage_notes(source.coverage)
    total, order = _count([[delta.name for delta in source] for source in sources], sides)
    first, second = sources
    found = runs.compare_into(out, first, second, inputs, top=top, sides=sides, **compute)
    return inputs, total, order, found


def _count(names: Sequence[Sequence[str]], sides: tuple[Any, ...]) -> tuple[int, dict[str, int]]:
    a, b = map(set, names)
    return len(a & b) * len(sides) + len(a ^ b), {name: place for place, name in enumerate(names[0])}


def _draw(out: str, done: list[SubspaceSimilarity]) -> list[str]:
    from spectra.cli.plot import draw_directories

    return draw_directories([out], out)


def _document(inputs: dict[str, Any], done: list[SubspaceSimilarity], undone: list[NotCompared]) -> dict[str, Any]:
    from spectra._version import __version__
    from spectra.results import tables

    return {
        "spectra": __version__,
        **inputs,
        "matrices": [
            {**tables.similarity_row(item), "grid": item.grid, "principal_angles": item.angles} for item in done
        ],
        "not_compared": [{"name": item.name, "reason": item.reason} for item in undone],
    }


def _print(done: list[SubspaceSimilarity]) -> None:
    from spectra.metrics.similarity import pool
    from spectra.results.tables import similarity_row

    header = ["matrix", "side", "k", "φ(k,k)", "chance", "φ(1,1)", "note"]
    shown = done
    if len(done) > _MOST_LINES:
        header[0] = "role"
        groups: dict[tuple[str, Any], list[SubspaceSimilarity]] = {}
        for item in done:
            groups.setdefault((item.role, item.side), []).append(item)
        shown = [pool(items, role) for (role, _), items in groups.items()]
    rows = [similarity_row(item) for item in shown]
    keys = ("name", "side", "k_used", "phi", "chance", "phi_1_1", "note")
    report.print_table(header, [[row[key] for key in keys] for row in rows])


def _close(done: list[SubspaceSimilarity], undone: list[NotCompared], out: str | None, written: list[str]) -> None:
    if out:
        report.note(f"results: {out}/similarity.csv, {out}/run.json, {out}/similarity/")
    for path in written:
        report.note(f"figure: {path}")
    only_one = [item for item in undone if item.reason.startswith("only in")]
    failed = [item for item in undone if item not in only_one]
    if only_one:
        report.note(
            f"{len(only_one)} matrices are in one update only, such as {only_one[0].name}: {only_one[0].reason}"
        )
    for item in failed:
        report.note(f"not compared: {item.name}: {item.reason}")
    if failed or not done:
        report.note(f"{len(failed)} of {len(done) + len(failed)} matrices could not be compared")
        sys.exit(1)
