"""`spectra verify`: is the adapter really in the merged model?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.heavy import heavy_imports
from spectra.cli.options import (
    HeadsType,
    bring,
    download_option,
    figures_options,
    json_option,
    layer_option,
    scale_option,
    table_option,
    within_reach,
)
from spectra.cli.table import Layout, View, print_rows, table_view
from spectra.cli.talk import say

if TYPE_CHECKING:
    from spectra.merges.report import MatrixCheck, MergeReport
    from spectra.results.tables import Row

_MOST_LINES = 12
_WIDTH = 78
_NUMBERS = ("scale", "residual", "rounding")


@click.command("verify", short_help="Is the adapter really in the merged model?")
@click.option(
    "--base", required=True, type=click.Path(), metavar="BASE", help="The model that the adapter was trained on."
)
@click.option(
    "--adapter", required=True, type=click.Path(), metavar="ADAPTER", help="The adapter that should be in it."
)
@click.option(
    "--merged",
    required=True,
    type=click.Path(),
    metavar="MERGED",
    help="The full weights that should be base + adapter.",
)
@layer_option
@click.option(
    "--heads",
    type=HeadsType(),
    default="mean",
    show_default=True,
    metavar="mean|sum|each|N",
    help="What multi-head adapters stand for.",
)
@scale_option
@download_option
@click.option(
    "--memory", metavar="SIZE", help="Budget for the matrices at work, such as 4GiB.  [default: half of what is free]"
)
@table_option
@figures_options
@json_option
@table_view
def command(
    base: str,
    adapter: str,
    merged: str,
    layers: tuple[str, ...],
    heads: str | int,
    scale: float | None,
    download: bool,
    memory: str | None,
    out: str | None,
    figures: str | None,
    as_json: bool,
    view: View,
) -> None:
    """Check a merged model against its base and adapter, matrix by matrix.

    Says of every matrix whether it is W₀ + ΔW bit for bit, up to rounding, or what it is instead. What the adapter
    does not touch must equal the base. Exit status 0 only if every matrix is what the merge should be.
    """
    with heavy_imports():
        from spectra.merges.claims import open_claims
        from spectra.merges.report import COLUMNS
        from spectra.merges.verify import check_claims, report_of

    view.check(COLUMNS)
    three = (within_reach(path, download) for path in (base, adapter, merged))
    claims = open_claims(*three, layers=layers, heads=heads, scale=scale)
    if download:
        bring((claims.base, claims.adapter, claims.merged), claims.files)
    for line in claims.notes:
        report.note(f"note: {line}")
    with report.progress(len(claims.claims), "spectra verify", otherwise="which is no verdict") as bar:
        checked = []
        for pair in check_claims(claims.claims, memory_budget=memory):
            checked.append(pair)
            bar.update()
    merge = report_of(claims, checked)
    document = _document(merge)
    if out:  # before anything is printed, which may end with the pipe that reads it
        report.keep_table(out, "verify", document)
        report.figures(report.draw(out, names=(), size=figures) if figures else [])
    if as_json:
        report.print_json(document)
    else:
        _print(merge, view)
    _close(merge)


def _document(merge: MergeReport) -> dict[str, Any]:
    from spectra._version import __version__

    return {
        "spectra": __version__,
        "kind": merge.kind,
        "base": merge.base,
        "adapter": merge.adapter,
        "merged": merge.merged,
        "verdict": merge.verdict,
        "counts": merge.counts,
        "untouched": merge.untouched,
        "matrices": [dict(row) for row in merge.matrices],
        "notes": list(merge.notes),
    }


def _print(merge: MergeReport, view: View) -> None:
    """What is wrong first, matrix by matrix, then the counts by role and verdict, or all matrices."""
    wrong = [row for row in merge.worst_first if not row.ok]
    for row in wrong[:_MOST_LINES]:
        _print_wrong(row)
    if len(wrong) > _MOST_LINES:
        say(f"… and {len(wrong) - _MOST_LINES:,} more; --json lists all")
    if wrong:
        say()

    def pool(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
        return [
            {"role": role, "verdict": verdict, "matrices": count, **_medians(merge, role, verdict)}
            for role, counts in merge.by_role().items()
            for verdict, count in counts.items()
        ]

    layout = Layout(
        shown={number: number for number in _NUMBERS},
        first={"name": "matrix", "verdict": "verdict"},
        group={"role": "role", "verdict": "verdict", "matrices": "matrices"},
        pool=pool,
        pooled=_NUMBERS,
        most=0,
    )
    print_rows([dict(row) for row in merge.matrices], layout, view)


def _print_wrong(row: MatrixCheck) -> None:
    import textwrap

    numbers = "" if row.scale is None else f" (s = {row.scale:.4g})"
    say(f"{row.name}: {row.verdict}{numbers}")
    if row.cause:
        for line in textwrap.wrap(row.cause, _WIDTH - 4):
            say(f"    {line}")


def _medians(merge: MergeReport, role: str, verdict: str) -> dict[str, float | None]:
    """The medians of the numbers of a role under a verdict; None where there are none."""
    from statistics import median

    rows = [row for row in merge.matrices if row.role == role and row.verdict == verdict and row.scale is not None]
    return {key: median(row[key] for row in rows) if rows else None for key in _NUMBERS}


def _close(merge: MergeReport) -> None:
    """Notes, the verdict in one line, and the exit status."""
    for text in sorted({row.note for row in merge.matrices if row.note}):
        report.note(f"note: {text}")
    for replay in sorted({row.replay for row in merge.matrices if row.verdict == "exact"}):
        count = sum(row.replay == replay for row in merge.matrices)
        report.note(f"bit for bit ({count:,} matrices): {replay}")
    good = sum(row.ok for row in merge.matrices)
    report.note(
        f"{good:,} of {len(merge):,} matrices are as merged; {merge.untouched:,} that the adapter does not touch "
        "equal the base"
    )
    if not merge.ok:
        sys.exit(1)
