"""`spectra similarity`: do two updates use the same directions?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.options import Compute, Opening, compute_options, result_options, source_options

if TYPE_CHECKING:
    from spectra.deltas.source import Source
    from spectra.metrics.similarity import SubspaceSimilarity
    from spectra.results.collection import Spectra
    from spectra.results.similarities import Compared, NotCompared

_MOST_LINES = 12
_UNKEPT = "nothing is stored: with --out DIR the same command goes on"


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
    opening: Opening,
    compute: Compute,
    out: str | None,
    figures: bool,
    as_json: bool,
) -> None:
    """Subspace similarity φ(i, j) of two updates, matrix by matrix, with its chance level.

    A and B are tuned models, adapters, or directories that `spectra svd --top K --out` made.
    """
    from spectra.results.streams import compare

    sides: tuple[Any, ...] = ("left", "right") if side == "both" else (side,)
    first, second = _open(a, b, base, opening)
    with compute.keywords() as keywords:
        stream = compare(first, second, top=top, sides=sides, out=out, labels=(a, b), **keywords)
        done, undone = _gather(stream, first.names, second.names, len(sides), out)
    report.reused(len(stream.reused), len({item.name for item in done}), out)
    written = report.draw(out, names=[item.name for item in done], sides=sides) if out and figures and done else []
    if as_json:
        inputs = {"kind": "similarity", "a": a, "b": b, "base": base, "options": opening.settings}
        report.print_json(_document(inputs, done, undone))
    else:
        _print(done)
    _close(done, undone, out, written)


def _open(a: str, b: str, base: str | None, opening: Opening) -> tuple[Source | Spectra, Source | Spectra]:
    """Both as stored results, or both as weights."""
    from spectra.results.collection import load

    stored = [Path(path, "run.json").is_file() for path in (a, b)]
    if all(stored):
        first, second = load(a), load(b)
        return (first.select(opening.layers), second.select(opening.layers)) if opening.layers else (first, second)
    if any(stored):
        raise click.UsageError("one of A and B holds stored results and the other weights: give two of a kind")
    return opening.open(a, base), opening.open(b, base)


def _gather(
    stream: Iterator[Compared], first: Sequence[str], second: Sequence[str], sides: int, out: str | None
) -> tuple[list[SubspaceSimilarity], list[NotCompared]]:
    """What was compared, in the first update's order, and what was not."""
    from spectra.results.similarities import NotCompared

    done: list[SubspaceSimilarity] = []
    undone: list[NotCompared] = []
    a, b = set(first), set(second)
    total = len(a & b) * sides + len(a ^ b)
    with report.progress(total, "spectra similarity", kept=out or "", otherwise=_UNKEPT) as bar:
        for item in stream:
            bar.update()
            if isinstance(item, NotCompared):
                undone.append(item)
            else:
                done.append(item)
    order = {name: place for place, name in enumerate(first)}
    done.sort(key=lambda item: order[item.name])
    return done, undone


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
    from spectra.results.similarities import pool_by_role
    from spectra.results.tables import similarity_row

    by_role = len(done) > _MOST_LINES
    rows = [similarity_row(item) for item in (pool_by_role(done) if by_role else done)]
    keys = ("name", "side", "k_used", "phi", "chance", "phi_1_1", "note")
    header = ["role" if by_role else "matrix", "side", "k", "φ(k,k)", "chance", "φ(1,1)", "note"]
    report.print_table(header, [[row[key] for key in keys] for row in rows])


def _close(done: list[SubspaceSimilarity], undone: list[NotCompared], out: str | None, written: list[Path]) -> None:
    if out:
        report.note(f"results: {out}/similarity.csv, {out}/run.json, {out}/similarity/")
    for path in written:
        report.note(f"figure: {path}")
    only_one = [item for item in undone if item.one_sided]
    failed = [item for item in undone if not item.one_sided]
    if only_one:
        report.note(
            f"{len(only_one)} matrices are in one update only, such as {only_one[0].name}: {only_one[0].reason}"
        )
    for item in failed:
        report.warning(f"not compared: {item.name}: {item.reason}")
    if failed or not done:
        report.warning(f"{len(failed)} of {len(done) + len(failed)} matrices could not be compared")
        sys.exit(1)
