"""`spectra svd`: the singular values, and vectors, of an update."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.heavy import heavy_imports
from spectra.cli.options import compute_options, executor_for, result_options, source_options

if TYPE_CHECKING:
    from spectra.deltas.source import Source
    from spectra.results.tables import Row

_SHOWN = ("norm", "relative_norm", "stable_rank", "effective_rank", "rank_90", "top_8_share")
_MOST_LINES = 12


@click.command("svd", short_help="Singular values of an update, and its vectors.")
@click.option(
    "--base", metavar="BASE", help="The model it started from: path, hub id or alias. Most adapters need none."
)
@click.option("--tuned", required=True, metavar="TUNED", help="The tuned model or adapter: path, hub id or alias.")
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Keep the top K singular vectors, too.")
@source_options
@compute_options
@result_options
def command(
    base: str | None,
    tuned: str,
    top: int | None,
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
    """Singular values of the update ΔW = tuned − base, matrix by matrix.

    Prints a table with one line per matrix, or per role where there are many. With --out it keeps
    everything there: summary.csv, the arrays, run.json and the −ln σ histogram.
    """
    from spectra.sources import open_source

    source = open_source(tuned, base, heads=heads, scale=scale, split=split)
    source = source.select(layers) if layers else source
    report.coverage_notes(source.coverage)
    settings = {"heads": heads, "scale": scale, "split": split}
    with executor_for(workers, cluster) as executor:
        compute = {"device": device, "executor": executor, "budget": memory}
        rows, values = _run(source, settings, top, compute, out, keep_values=as_json)
    written = _draw(out, source) if out and figures else []
    if as_json:
        report.print_json(_document(source, rows, values))
    else:
        _print(rows)
    _close(rows, out, written)


def _run(
    source: Source,
    settings: dict[str, Any],
    top: int | None,
    compute: dict[str, Any],
    out: str | None,
    keep_values: bool,
) -> tuple[list[Row], dict[str, list[float]]]:
    """Decompose everything that is not stored yet; rows in the source's order."""
    with heavy_imports():
        from spectra.results import resume as runs
        from spectra.results import tables

    order = {delta.name: place for place, delta in enumerate(source)}
    rows: list[Row] = []
    values: dict[str, list[float]] = {}
    with report.progress(len(source), "spectra svd") as bar:
        for spectrum in runs.decompose_into(out, source, settings, top=top, **compute):
            rows.append(tables.row(spectrum))
            if keep_values:
                values[spectrum.name] = spectrum.S.tolist()
            bar.update()
    rows.sort(key=lambda line: order[line["name"]])
    return rows, values


def _draw(out: str, source: Source) -> list[str]:
    from spectra.cli.plot import draw_directories

    return draw_directories([out], out, only=[delta.name for delta in source])


def _document(source: Source, rows: list[Row], values: dict[str, list[float]]) -> dict[str, Any]:
    from dataclasses import asdict

    from spectra._version import __version__

    matrices = [{**line, "singular_values": values[line["name"]]} for line in rows]
    return {
        "spectra": __version__,
        "kind": source.kind,
        "tuned": source.tuned,
        "base": source.base,
        "coverage": asdict(source.coverage),
        "matrices": matrices,
    }


def _print(rows: list[Row]) -> None:
    from spectra.spectrum import DONE

    done = [line for line in rows if line["status"] in DONE]
    if len(rows) <= _MOST_LINES:
        report.print_table(
            ["matrix", "shape", "status", *_SHOWN],
            [[r["name"], f"{r['out']}×{r['in']}", r["status"], *(r[key] for key in _SHOWN)] for r in rows],
        )
        return
    roles: dict[str, list[Row]] = {}
    for line in done:
        roles.setdefault(line["role"], []).append(line)
    report.print_table(
        ["role", "matrices", "unchanged", *(f"{key}" for key in _SHOWN)],
        [
            [role, len(lines), sum(r["status"] == "unchanged" for r in lines), *(_median(lines, key) for key in _SHOWN)]
            for role, lines in roles.items()
        ],
    )
    report.note("medians over the changed matrices of a role; every matrix is in summary.csv (--out) and --json")


def _median(rows: list[Row], key: str) -> float | None:
    import numpy as np

    found = [line[key] for line in rows if line["status"] == "ok" and line[key] == line[key]]
    return float(np.median(found)) if found else None


def _close(rows: list[Row], out: str | None, written: list[str]) -> None:
    """Notes on the result, where things are, and the exit status."""
    from spectra.spectrum import DONE

    for text in sorted({line["note"] for line in rows if line["note"]}):
        report.note(f"note: {text}")
    clamped = [line for line in rows if line["status"] == "ok" and line["reason"]]
    if clamped:
        report.note(f"note: {clamped[0]['name']}: {clamped[0]['reason']} ({len(clamped)} matrices)")
    if out:
        report.note(f"results: {out}/summary.csv, {out}/run.json, {out}/spectra/")
    for path in written:
        report.note(f"figure: {path}")
    undone = [line for line in rows if line["status"] not in DONE]
    for line in undone:
        report.note(f"not done: {line['name']}: {line['status']}: {line['reason']}")
    if undone:
        report.note(f"{len(undone)} of {len(rows)} matrices could not be done")
        sys.exit(1)
