"""`spectra alignment`: what an update does to the directions of W₀."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.heavy import heavy_imports
from spectra.cli.options import (
    Compute,
    Opening,
    compute_options,
    figures_options,
    json_option,
    source_options,
    table_option,
    tuned_argument,
)
from spectra.cli.table import Layout, View, print_rows, table_view

if TYPE_CHECKING:
    from spectra.results.tables import Row

_LAYOUT = Layout(
    shown={
        "intruders": "intruders",
        "amplification": "amplified",
        "left_in_top": "left",
        "right_in_top": "right",
    },
    group={"role": "role", "matrices": "matrices", "unchanged_matrices": "unchanged"},
)
_COUNTS = Layout(shown={"k": "k", "intruders": "intruders", "decided_by": "decided by"}, most=sys.maxsize)


@click.command("alignment", short_help="What an update does to the directions of W₀.")
@tuned_argument
@click.option("--base", type=click.Path(), metavar="BASE", help="The model it started from: path, hub id or alias.")
@click.option("--k", type=click.IntRange(min=1), default=10, show_default=True, help="How many top directions.")
@click.option(
    "--epsilon", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True,
    help="The cosine with all of W₀'s directions under which one of W is an intruder.",
)  # fmt: skip
@click.option(
    "--cache", type=click.Path(file_okay=False), metavar="DIR",
    help="Keep W₀'s singular vectors here: most of the time, and the next run with this base reads them.",
)  # fmt: skip
@click.option(
    "--intruders-only", is_flag=True,
    help="Count intruder dimensions and nothing else: as exact, and mostly without W₀'s decomposition.",
)  # fmt: skip
@source_options
@compute_options
@table_option
@figures_options
@json_option
@table_view
def command(
    base: str | None,
    tuned: str,
    k: int,
    epsilon: float,
    cache: str | None,
    intruders_only: bool,
    opening: Opening,
    compute: Compute,
    out: str | None,
    figures: str | None,
    as_json: bool,
    view: View,
) -> None:
    """ΔW against W₀: intruder dimensions, amplification and shares of energy, matrix by matrix.

    Prints the main columns; --json and --out hold all of them, each with its chance level or control, and --out
    draws how W's top directions stand to W₀'s, and where in W₀'s spectrum the energy of ΔW lies.
    """
    source = opening.open(tuned, base)
    with heavy_imports():
        from spectra.results import intruders
        from spectra.results.alignment import COLUMNS, alignment_rows

    view.check(intruders.COLUMNS if intruders_only else COLUMNS)

    make, name = (intruders.intruder_rows, "intruders") if intruders_only else (alignment_rows, "alignment")
    rows: list[Row] = []
    kept = f"the vectors of W₀ are in {cache}" if cache else "nothing is stored: --cache DIR keeps W₀'s vectors"
    with report.progress(len(source), "spectra alignment", otherwise=kept) as bar, compute.keywords() as keywords:
        for row in make(source, k=k, epsilon=epsilon, cache=cache, **keywords):
            rows.append(row)
            bar.update()
    document = {
        **report.heading(source),
        "options": {"k": k, "epsilon": epsilon},
        "coverage": asdict(source.coverage),
        "matrices": rows,
    }
    if out:  # before anything is printed, which may end with the pipe that reads it
        report.keep_table(out, name, document)
        report.figures(report.draw(out, names=source.names, size=figures) if figures else [])
    if as_json:
        report.print_json(document)
    elif intruders_only:
        _print_counts(rows, view)
    else:
        _print(rows, view)
    report.close(rows)


def _print_counts(rows: list[Row], view: View) -> None:
    """A line per matrix, and what the counts rest on."""
    print_rows(rows, _COUNTS, view)
    done = [row["intruders"] for row in rows if row["status"] == "ok"]
    report.note(f"{sum(done)} intruders in {len(done)} matrices")


def _print(rows: list[Row], view: View) -> None:
    """A line per matrix, or the medians of a role where there are many; chance levels as a note."""
    if print_rows(rows, _LAYOUT, view):
        report.note("medians over the changed matrices of a role; --all lists every matrix, and so do --out and --json")
    done = [row for row in rows if row["status"] == "ok"]
    if done:
        report.note(f"left, right: shares of ‖ΔW‖² in W₀'s top directions; by chance {_chance(done)}")
        randoms = [row["amplification_random"] for row in done]
        report.note(f"amplified: ‖ΔW‖ / ‖UᵀW₀V‖; in random directions {_range(randoms)}")


def _chance(rows: list[Row]) -> str:
    return ", ".join(f"{_range([row[f'{side}_chance'] for row in rows])} ({side})" for side in ("left", "right"))


def _range(values: list[Any]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} – {high}"
