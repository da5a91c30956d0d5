"""`spectra inspect`: what lies at a path, from headers only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from spectra.cli import report
from spectra.cli.options import HeadsType, json_option, scale_option

if TYPE_CHECKING:
    from spectra.results.inspection import Inspection


@click.command("inspect", short_help="What a model or adapter holds, from headers only.")
@click.argument("path", metavar="PATH", type=click.Path())
@click.option("--base", type=click.Path(), metavar="BASE", help="Pair it with this model and show what fits.")
@click.option("--heads", type=HeadsType(), default="mean", help="What multi-head adapters stand for.", hidden=True)
@scale_option
@json_option
def command(path: str, base: str | None, heads: str | int, scale: float | None, as_json: bool) -> None:
    """What is in a model or adapter: kind, matrices, ranks, dtype and size, and what will not be used.

    Reads headers only. A full checkpoint is listed on its own, or paired where --base is given.
    """
    from spectra.results.inspection import inspect

    inspection = inspect(path, base, heads=heads, scale=scale)
    if as_json:
        report.print_json(inspection.to_dict())
    else:
        _print(inspection)


def _say_what_is_read(inspection: Inspection) -> None:
    """Of a model on a server: what this took, and what a command would take."""
    from spectra.engine.memory import readable_size
    from spectra.files.http import received

    if not received():
        return
    roles = inspection.to_read
    each = ", ".join(f"{role} {readable_size(size)}" for role, size in roles.items())
    click.echo(
        f"from the server: {readable_size(received())} read now; a command reads {readable_size(sum(roles.values()))} "
        f"({each})"
    )


def _print(inspection: Inspection) -> None:
    from spectra import text
    from spectra.engine.memory import readable_size

    said = inspection.to_dict()
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in said["dtypes"].items())
    click.echo(f"{said['path']}: {said['kind']}" + (f" ({said['model_type']})" if said["model_type"] else ""))
    click.echo(
        f"{said['tensors']} tensors ({dtypes}), {said['parameters']:,} parameters, {readable_size(said['bytes'])}"
    )
    click.echo()
    report.print_table(
        ["role", "shape", "rank ≤", "status", "matrices"],
        [
            [row["role"], text.size(row["shape"]), row["max_rank"], row["status"] or "–", row["matrices"]]
            for row in inspection.by_role
        ],
    )
    _say_what_is_read(inspection)
    for line in said.get("notes", ()):
        click.echo(f"note: {line}")
    for line in said.get("warnings", ()):
        click.echo(f"warning: {line}")
    for name, reason in said["unreadable"].items():
        click.echo(f"unreadable: {name}: {reason}")
    click.echo()
    if inspection.source is not None:
        click.echo(str(inspection.source.coverage))
    else:
        click.echo(inspection.needs)
