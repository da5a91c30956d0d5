"""`spectra interference`: what several updates do to each other when they are added."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from spectra.cli import report
from spectra.cli.heavy import heavy_imports
from spectra.cli.options import (
    Opening,
    executor_of,
    figures_options,
    json_option,
    source_options,
    table_option,
    workers_option,
)
from spectra.cli.table import Layout, View, print_rows, table_view

if TYPE_CHECKING:
    from spectra.results.tables import Row

_LAYOUT = Layout(
    shown={
        "mean_cosine": "cosine",
        "norm_ratio": "ratio",
        "sti": "STI",
        "mean_sar": "SAR",
        "shared": "shared",
        "shared_null": "chance",
    }
)


@click.command("interference", short_help="What several updates do to each other when added.")
@click.argument("updates", metavar="A B [C …]", nargs=-1, required=True)
@click.option("--base", metavar="BASE", help="The model all of them started from, where the formats need it.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]", help="Where to compute.")
@source_options
@workers_option
@table_option
@figures_options
@json_option
@table_view
def command(
    updates: tuple[str, ...],
    base: str | None,
    device: str,
    opening: Opening,
    workers: int | None,
    out: str | None,
    figures: str | None,
    as_json: bool,
    view: View,
) -> None:
    """Cosines of updates, what their sum keeps of their norm, STI and SAR, and what they share, matrix by matrix.

    A, B, … are tuned models or adapters of one base. Prints means over pairs and updates; --json and --out hold
    every pair's cosine and every update's SAR. "shared" is the share of what is not their common mean that lies in as
    many directions as one update needs for 90 % of itself; "chance" is that of random updates with the same values.
    """
    if len(updates) < 2:
        raise click.UsageError("interference is between updates: give two or more")
    with heavy_imports():
        from spectra.results.interference import ALONE, COLUMNS, interference_rows

    view.check(COLUMNS)
    sources = opening.open_all(updates, base)
    rows: list[Row] = []
    names = {name for source in sources for name in source.names}
    with report.progress(len(names), "spectra interference") as bar, executor_of(workers, None) as executor:
        for row in interference_rows(sources, device=device, executor=executor):
            rows.append(row)
            bar.update()
    document = {
        **report.heading(sources[0]),
        "kind": "interference",
        "tuned": list(updates),
        "coverage": [asdict(source.coverage) for source in sources],
        "matrices": rows,
    }
    if out:  # before anything is printed, which may end with the pipe that reads it
        report.keep_table(out, "interference", document)
        report.figures(report.draw(out, names=(), size=figures) if figures else [])
    if as_json:
        report.print_json(document)
    else:
        _print([row for row in rows if row["status"] != ALONE], view)
    alone = [row for row in rows if row["status"] == ALONE]
    if alone:
        report.note(f"{len(alone)} matrices are in one update only, such as {alone[0]['name']}: {alone[0]['reason']}")
    report.close(rows, done=("ok", ALONE))


def _print(rows: list[Row], view: View) -> None:
    if print_rows(rows, _LAYOUT, view):
        report.note("medians over the matrices of a role; --all lists every matrix, and so do --out and --json")
    report.note("by chance: cosine 0, norm ratio 1; SAR √(k/m), in --json as sar_chance; shared as beside it")
