"""`spectra inspect`: what lies at a path, from headers only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from spectra.cli import report
from spectra.cli.options import HeadsType, json_option, scale_option
from spectra.cli.table import Layout, View, print_rows, table_view
from spectra.cli.talk import say

if TYPE_CHECKING:
    from spectra.results.inspection import Inspection
    from spectra.results.tables import Row


@click.command("inspect", short_help="What a model or adapter holds, from headers only.")
@click.argument("path", metavar="PATH", type=click.Path())
@click.option("--base", type=click.Path(), metavar="BASE", help="Pair it with this model and show what fits.")
@click.option("--heads", type=HeadsType(), default="mean", help="What multi-head adapters stand for.", hidden=True)
@scale_option
@click.option("--verify", is_flag=True, help="PATH holds results: hold every stored file against its checksums.")
@json_option
@table_view
def command(
    path: str, base: str | None, heads: str | int, scale: float | None, verify: bool, as_json: bool, view: View
) -> None:
    """What is in a model or adapter: kind, matrices, ranks, dtype and size, and what will not be used.

    Reads headers only. A full checkpoint is listed on its own, or paired where --base is given. Of stored results,
    --verify tells which files are sound; the same run again computes anew what is not.
    """
    if verify:
        _verify(path, as_json)
        return
    from spectra.results.inspection import COLUMNS, inspect

    view.check(COLUMNS)
    inspection = inspect(path, base, heads=heads, scale=scale)
    if as_json:
        report.print_json(inspection.to_dict())
    else:
        _print(inspection, view)


def _verify(path: str, as_json: bool) -> None:
    """What of a results directory is sound; exit status 1 if something is damaged."""
    from collections import Counter
    from dataclasses import asdict

    from spectra.results.soundness import check_results

    findings = check_results(path)
    counts = Counter(finding.state for finding in findings)
    if as_json:
        report.print_json({"path": path, "counts": dict(counts), "files": [asdict(finding) for finding in findings]})
    else:
        say(f"{path}: {len(findings)} files: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
        for finding in findings:
            if finding.state == "damaged":
                say(f"damaged: {finding.file}: {finding.reason}")
    if counts["no checksum"]:
        report.note("files without a checksum were written before there were any: they are read as they are")
    if counts["damaged"]:
        sys.exit(1)


def _say_what_is_read(inspection: Inspection) -> None:
    """Of a model on a server: what this took, and what a command would take."""
    from spectra.engine.memory import readable_size
    from spectra.files.http import received

    if not received() or not (asked := inspection.all_from_server):
        return
    roles = inspection.from_server
    each = "" if inspection.modules else f" ({', '.join(f'{role} {readable_size(n)}' for role, n in roles.items())})"
    say(f"from the server: {readable_size(received())} read now; a command reads {readable_size(asked)}{each}")


def _print_matrices(inspection: Inspection, view: View) -> None:
    from spectra import text
    from spectra.results.inspection import COLUMNS

    def sized(rows: Sequence[Row]) -> list[Row]:
        unknown = dict.fromkeys(COLUMNS)
        return [unknown | row | {"shape": text.size(row["shape"]), "status": row.get("status")} for row in rows]

    layout = Layout(
        shown={"shape": "shape", "max_rank": "rank ≤", "status": "status"},
        group={"role": "role", "matrices": "matrices"},
        pool=lambda rows, columns: sized(inspection.by_role),
        pooled={"shape", "max_rank", "status"},
        most=0,
    )
    print_rows(sized(inspection.matrices), layout, view)


def _print(inspection: Inspection, view: View) -> None:
    from spectra.engine.memory import readable_size

    said = inspection.told()
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in said["dtypes"].items())
    say(f"{said['path']}: {said['kind']}" + (f" ({said['model_type']})" if said["model_type"] else ""))
    say(f"{said['tensors']} tensors ({dtypes}), {said['parameters']:,} parameters, {readable_size(said['bytes'])}")
    say()
    _print_matrices(inspection, view)
    _say_what_is_read(inspection)
    for line in said.get("notes", ()):
        say(f"note: {line}")
    for line in said.get("warnings", ()):
        say(f"warning: {line}")
    for name, reason in said["unreadable"].items():
        say(f"unreadable: {name}: {reason}")
    say()
    if inspection.source is not None:
        say(str(inspection.source.coverage))
    else:
        say(inspection.needs)
