"""`spectra svd`: the singular values, and vectors, of an update."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.drawing import drawing_process
from spectra.cli.heavy import heavy_imports
from spectra.cli.options import Compute, Opening, compute_options, result_options, source_options, tuned_argument
from spectra.cli.table import Layout, View, print_rows, table_view

if TYPE_CHECKING:
    from spectra.deltas.source import Source
    from spectra.results.tables import Row
    from spectra.spectrum import Spectrum

# Ranks of the signal: a correct merge in bf16 is of full rank, and only a few values of that are the update.
_SHOWN = (
    "norm",
    "relative_norm",
    "signal_rank",
    "stable_rank",
    "signal_effective_rank",
    "signal_rank_90",
    "top_8_share",
)
_LAYOUT = Layout(
    shown={name: name for name in _SHOWN},
    beside={"shape": "shape", "status": "status"},
    group={"role": "role", "matrices": "matrices", "unchanged_matrices": "unchanged"},
)


@click.command("svd", short_help="Singular values of an update, and its vectors.")
@tuned_argument
@click.option(
    "--base",
    type=click.Path(),
    metavar="BASE",
    help="The model it started from: path, hub id, URL or alias. Most adapters need none.",
)
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Keep the top K singular vectors, too.")
@click.option(
    "--vectors",
    type=click.Choice(("float32", "float64")),
    default="float32",
    show_default=True,
    help="With --top and --out: what vectors are kept in. float32 changes entries by 6e-8 of themselves.",
)
@click.option(
    "--rehash",
    is_flag=True,
    help="With --out: hash all of every file that is read, and hold it against the stored run's, not samples alone.",
)
@source_options
@compute_options
@result_options
@table_view
def command(
    base: str | None,
    tuned: str,
    top: int | None,
    vectors: str,
    rehash: bool,
    opening: Opening,
    compute: Compute,
    out: str | None,
    figures: str | None,
    as_json: bool,
    view: View,
) -> None:
    """Singular values of the update ΔW = tuned − base, matrix by matrix.

    Prints a table with one line per matrix, or per role where there are many. With --out it keeps
    everything there: summary.csv, the arrays, run.json, the −ln σ histogram and the picture over layers and roles.
    """
    source = opening.open(tuned, base)
    _check(view)
    drawn = bool(out and figures)
    with drawing_process(drawn) as process:
        with compute.keywords() as keywords:
            keeping = {"rehash": rehash, "vectors": vectors}
            shown = None if out or as_json else {*_SHOWN, *view.chosen}
            rows, held, finished = _run(source, top, out, keywords | keeping, keep=drawn or as_json, columns=shown)
        written: list[Path] = []
        if out and figures:
            names = [delta.name for delta in source]
            written = report.draw(out, names=names, size=figures, finished=finished, held=held, process=process)
    if as_json:
        report.print_json(_document(source, rows, held))
    else:
        _print(rows, view)
    _say_what_moved(rows)
    _warn(source, rows)
    _close(rows, out, written)


def _say_what_moved(rows: list[Row]) -> None:
    """One line over the whole model, of what is known."""
    from spectra.results.tables import model_row

    whole = model_row(rows)
    said = []
    if whole["moved"] is not None:
        some = f"{whole['moved_1e-6']:.1%} by more than 1e-6, {whole['moved_1e-5']:.1%} by more than 1e-5"
        said.append(f"{whole['moved']:.1%} of {whole['moved_entries']:,} entries moved, {some}")
    if whole["o_over_q"] is not None:
        said.append(f"relative norm of o_proj over q_proj {whole['o_over_q']:.3g}")
    if said:
        report.note("over all matrices: " + "; ".join(said))


def _check(view: View) -> None:
    if view.chosen:
        from spectra.results import tables
        from spectra.spectrum import Spectrum

        view.check([*tables.row(Spectrum("", (0, 0), "failed")), "shape"])


def _warn(source: Source, rows: list[Row]) -> None:
    from spectra.results.relation import unrelated

    text = unrelated(source, rows)
    if text:
        report.warning(f"warning: {text}")


def _run(
    source: Source,
    top: int | None,
    out: str | None,
    compute: dict[str, Any],
    *,
    keep: bool,
    columns: set[str] | None,
) -> tuple[list[Row], list[Spectrum], bool]:
    """Rows in the source's order, the spectra without vectors if they are wanted, and whether all was there before.

    With `columns`, no other metric than these is measured: of thousands of small matrices that is what takes long.
    """
    with heavy_imports():
        from spectra.metrics import METRICS
        from spectra.results import tables
        from spectra.results.streams import decompose

    metrics = {name: metric for name, metric in METRICS.items() if columns is None or name in columns}
    order = {delta.name: place for place, delta in enumerate(source)}
    rows: list[Row] = []
    held: list[Spectrum] = []
    stream = decompose(source, top=top, out=out, **compute)
    unkept = "nothing is stored: with --out DIR the same command goes on"
    with report.progress(len(source), "spectra svd", kept=out or "", otherwise=unkept) as bar:
        for spectrum in stream:
            rows.append(tables.row(spectrum, metrics))
            if keep:
                held.append(tables.without_vectors(spectrum))
            bar.update()
    report.reused(len(stream.reused), len(rows), out, stream.notes)
    rows.sort(key=lambda line: order[line["name"]])
    return rows, held, len(stream.reused) == len(rows)


def _document(source: Source, rows: list[Row], held: list[Spectrum]) -> dict[str, Any]:
    from dataclasses import asdict

    from spectra._version import __version__
    from spectra.results import tables

    values = {spectrum.name: spectrum.S for spectrum in held}
    matrices = [{**line, "singular_values": values[line["name"]].tolist()} for line in rows]
    return {
        "spectra": __version__,
        "kind": source.kind,
        "tuned": source.tuned,
        "base": source.base,
        "coverage": asdict(source.coverage),
        "matrices": matrices,
        "model": tables.model_row(rows),
    }


def _print(rows: list[Row], view: View) -> None:
    sized = [row | {"shape": f"{row['out']}×{row['in']}"} for row in rows]
    if print_rows(sized, _LAYOUT, view):
        report.note("medians over the changed matrices of a role; --all lists every matrix, and so do --out and --json")


def _close(rows: list[Row], out: str | None, written: list[Path]) -> None:
    """Notes on the result, where things are, and the exit status."""
    from spectra.spectrum import DONE
    from spectra.text import matrices

    for text in sorted({line["note"] for line in rows if line["note"]}):
        report.note(f"note: {text}")
    for text, count in Counter(line["rounding"] for line in rows if line["rounding"]).most_common():
        report.note(f"rounding: {text} ({matrices(count)})")
    clamped = [line for line in rows if line["status"] == "ok" and line["reason"]]
    if clamped:
        report.note(f"note: {clamped[0]['name']}: {clamped[0]['reason']} ({len(clamped)} matrices)")
    if out:
        report.note(f"results: {out}/summary.csv, {out}/run.json, {out}/spectra/")
    report.figures(written)
    undone = [line for line in rows if line["status"] not in DONE]
    for line in undone:
        report.warning(f"not done: {line['name']}: {line['status']}: {line['reason']}")
    if undone:
        report.warning(f"{len(undone)} of {len(rows)} matrices could not be done")
        sys.exit(1)
