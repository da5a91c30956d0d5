"""`spectra similarity`: do updates use the same directions?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import pairs, report
from spectra.cli.options import Compute, Opening, compute_options, result_options, source_options
from spectra.cli.table import Layout, View, print_rows, table_view

if TYPE_CHECKING:
    from spectra.deltas.source import Source
    from spectra.metrics.similarity import SubspaceSimilarity
    from spectra.results.collection import Spectra
    from spectra.results.similarities import Compared, NotCompared
    from spectra.results.tables import Row

_UNKEPT = "nothing is stored: with --out DIR the same command goes on"


@click.command("similarity", short_help="Do updates use the same directions?")
@click.argument("updates", metavar="A B [C …]", nargs=-1, required=True)
@click.option("--base", metavar="BASE", help="The model all of them started from, where the formats need it.")
@click.option(
    "--top", type=click.IntRange(min=1), default=30, show_default=True, metavar="K", help="How many directions."
)
@click.option("--side", type=click.Choice(["left", "right", "both"]),
              help="Left singular vectors (out), right ones (in), or both.  "
              "[default: left; with --against right]")  # fmt: skip
@click.option("--against", metavar="PATTERN", help="Compare the matrices of --layer in A with these of the same layers "
              "in B, or in A itself where B is left out: --layer q_proj --against k_proj.")  # fmt: skip
@click.option("--cluster-order", "clustered", is_flag=True,
              help="Of three and more: those that share directions stand together.")  # fmt: skip
@source_options
@compute_options
@result_options
@table_view
def command(
    updates: tuple[str, ...],
    base: str | None,
    top: int,
    side: str | None,
    against: str | None,
    clustered: bool,
    opening: Opening,
    compute: Compute,
    out: str | None,
    figures: str | None,
    as_json: bool,
    view: View,
) -> None:
    """Subspace similarity φ(i, j) of updates, two by two and matrix by matrix, with its chance level.

    A, B, … are tuned models, adapters, or directories that `spectra svd --out` made. Of more than two, every pair is
    compared and each update is decomposed once; --out keeps every pair, and the same command with more updates goes on.
    """
    _check(updates, against, opening, clustered)
    _check_view(view, len(updates))
    sides = _sides(side, against)
    if len(updates) > 2:
        opened = _open(updates, base, [opening] * len(updates), top)
        sources: dict[str, Source | Spectra] = dict(zip(updates, opened, strict=True))
        heading = {"base": base, "options": opening.settings}
        wanted = pairs.Wanted(top, sides, out, figures, clustered, as_json, view)
        with compute.keywords() as keywords:
            pairs.compare(sources, wanted, heading, keywords)
        return
    a, b = updates if len(updates) == 2 else updates * 2
    openings = [opening, replace(opening, layers=(against,)) if against else opening]
    first, second = _open((a, b), base, openings, top)
    with compute.keywords() as keywords:
        from spectra.results.streams import compare

        by: Any = "layer" if against else "name"
        stream = compare(first, second, top=top, sides=sides, out=out, labels=(a, b), by=by, **keywords)
        done, undone = _gather(stream, first.names, second.names, len(sides), out, across=bool(against))
    titles = [item.title for item in done]
    report.reused(len(stream.reused), len(set(titles)), out, stream.notes)
    finished = len(stream.reused) == len(set(titles))
    written: list[Path] = []
    if out and figures and done:
        written = report.draw(out, names=titles, sides=sides, size=figures, finished=finished)
    if as_json:
        inputs = {"kind": "similarity", "a": a, "b": b, "base": base, "options": opening.settings}
        report.print_json(_document(inputs, done, undone))
    else:
        _print(done, view)
    _close(done, undone, out, written)


def _check(updates: Sequence[str], against: str | None, opening: Opening, clustered: bool) -> None:
    if len(updates) == 1 and not against:
        raise click.UsageError("updates are compared two by two: give two or more, or one with --layer and --against")
    if against and len(updates) > 2:
        raise click.UsageError("--against is between two updates, or within one: give one or two")
    if against and not opening.layers:
        raise click.UsageError("--against needs --layer: which matrices are compared with which?")
    if clustered and len(updates) < 3:
        raise click.UsageError("--cluster-order puts three or more updates into an order")
    twice = sorted({update for update in updates if updates.count(update) > 1}) if len(updates) > 2 else []
    if twice:
        raise click.UsageError(f"{twice[0]} is given twice: every pair is compared anyway")


def _check_view(view: View, updates: int) -> None:
    if view.chosen:
        from spectra.results.pairs import COLUMNS
        from spectra.results.tables import SIMILARITY_COLUMNS

        view.check(COLUMNS if updates > 2 else SIMILARITY_COLUMNS)


def _sides(side: str | None, against: str | None) -> tuple[Any, ...]:
    """Both sides, one, or the one that updates share: matrices of two roles have their inputs in common."""
    if side is None:
        return ("right",) if against else ("left",)
    return ("left", "right") if side == "both" else (side,)


def _open(
    updates: Sequence[str], base: str | None, openings: Sequence[Opening], top: int
) -> list[Source] | list[Spectra]:
    """All as stored results, if they hold vectors; else all as weights, stored ones from what they were made of."""
    from spectra.results.collection import holds_results, load
    from spectra.results.recorded import recorded_source

    stored = {path: load(path) for path in updates if holds_results(path)}
    if all(path in stored and not stored[path].lacks_vectors for path in updates):
        runs = [stored[path] for path in updates]
        return [run.select(how.layers) if how.layers else run for run, how in zip(runs, openings, strict=True)]
    weights = [path for path in dict.fromkeys(updates) if path not in stored]
    chosen = [how.layers for how in openings]
    opening = replace(openings[0], layers=tuple(chain(*chosen)) if all(chosen) else ())
    opened = dict(zip(weights, opening.opened_all(weights, base), strict=True))
    for path in stored:
        opened[path] = recorded_source(stored[path], top + 1)
        made_of = f"computed from {opened[path].tuned}, which it was made of"
        if stored[path].lacks_vectors:
            report.note(f"{path} holds no vectors: {made_of}; spectra svd … --top {top + 1} --out DIR keeps them")
        else:
            report.note(f"{path} is compared with weights: {made_of}")
    return [how.chosen(opened[path]) for path, how in zip(updates, openings, strict=True)]


def _gather(
    stream: Iterator[Compared],
    first: Sequence[str],
    second: Sequence[str],
    sides: int,
    out: str | None,
    *,
    across: bool = False,
) -> tuple[list[SubspaceSimilarity], list[NotCompared]]:
    """What was compared, in the first update's order, and what was not."""
    from spectra.results.similarities import NotCompared

    done: list[SubspaceSimilarity] = []
    undone: list[NotCompared] = []
    a, b = set(first), set(second)
    total = len(first) * sides if across else len(a & b) * sides + len(a ^ b)
    with report.progress(total, "spectra similarity", kept=out or "", otherwise=_UNKEPT) as bar:
        for item in stream:
            bar.update()
            if isinstance(item, NotCompared):
                undone.append(item)
            else:
                done.append(item)
    order = {name: place for place, name in enumerate(first)}
    others = {name: place for place, name in enumerate(second)}
    done.sort(key=lambda item: (order[item.name], others.get(item.other, -1)))
    return done, undone


def _document(inputs: dict[str, Any], done: list[SubspaceSimilarity], undone: list[NotCompared]) -> dict[str, Any]:
    from spectra._version import __version__
    from spectra.results import tables
    from spectra.results.pairs import Pair, Pairs

    a, b = str(inputs["a"]), str(inputs["b"])
    as_pairs = Pairs(Pair(a, b if b != a else f"{b} (2)", item) for item in done)
    return {
        "spectra": __version__,
        **inputs,
        "matrices": [
            {**tables.similarity_row(item), "grid": item.grid, "principal_angles": item.angles} for item in done
        ],
        "pairs": [row | {"b": b} for row in as_pairs.rows()],
        "pooled": [row | {"b": b} for row in as_pairs.pooled("role")],
        "not_compared": [{"name": item.name, "status": item.status, "reason": item.reason} for item in undone],
    }


def _print(done: list[SubspaceSimilarity], view: View) -> None:
    from spectra.results.similarities import pool_by_role
    from spectra.results.tables import SIMILARITY_COLUMNS

    def pool(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
        return [row | {"role": row["name"]} for row in map(_row, pool_by_role(done))]

    layout = Layout(
        shown={"side": "side", "k_used": "k", "phi": "φ(k,k)", "chance": "chance", "phi_1_1": "φ(1,1)", "note": "note"},
        group={"role": "role"},
        pool=pool,
        pooled=set(SIMILARITY_COLUMNS) - {"name", "other"},
    )
    if print_rows([_row(item) for item in done], layout, view):
        report.note("means over the matrices of a role; --all lists every matrix, and so do --out and --json")


def _row(item: SubspaceSimilarity) -> Row:
    """A line of the table, whose name says what it is compared with where that has another."""
    from spectra.results.partners import apart, weight_of
    from spectra.results.tables import similarity_row

    row = similarity_row(item)
    name, other = row["name"], row["other"]
    if not other or other == weight_of(name):  # a head against the whole weight of the same name
        return row
    return row | {"name": f"{name} against {apart(name, other) or other}"}


def _close(done: list[SubspaceSimilarity], undone: list[NotCompared], out: str | None, written: list[Path]) -> None:
    if out:
        report.note(f"results: {out}/similarity.csv, {out}/run.json, {out}/similarity/")
    report.figures(written)
    only_one = [item for item in undone if item.one_sided]
    failed = [item for item in undone if item.status == "failed"]
    if only_one:
        report.note(
            f"{len(only_one)} matrices are in one update only, such as {only_one[0].name}: {only_one[0].reason}"
        )
    report.by_reason("not compared", {item.name: item.reason for item in undone if not item.one_sided})
    if failed:
        report.warning(f"{len(failed)} of {len(done) + len(failed)} matrices could not be compared")
    elif not done:
        report.warning("nothing is left to compare")
    if failed or not done:
        sys.exit(1)
