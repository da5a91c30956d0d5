"""`spectra inspect`: what lies at a path, from headers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.options import HeadsType

if TYPE_CHECKING:
    from spectra.deltas.source import Source
    from spectra.files.folder import Folder


@click.command("inspect", short_help="What a model or adapter holds, from headers only.")
@click.argument("path", metavar="PATH")
@click.option("--base", metavar="BASE", help="Pair it with this model and show what fits.")
@click.option("--heads", type=HeadsType(), default="mean", help="What multi-head adapters stand for.", hidden=True)
@click.option("--scale", type=float, help="The scale s where the adapter does not carry α/r.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")
def command(path: str, base: str | None, heads: str | int, scale: float | None, as_json: bool) -> None:
    """What is in a model or adapter: kind, matrices, ranks, dtype and size, and what will not be used.

    Reads headers only. A full checkpoint is listed on its own, or paired where --base is given.
    """
    from spectra.errors import BaseRequiredError
    from spectra.files import hub
    from spectra.files.folder import open_folder
    from spectra.sources import format_of, source_of

    folder = open_folder(hub.resolve(path))
    kind = format_of(folder).kind
    try:
        source = source_of(folder, base, heads=heads, scale=scale)
    except BaseRequiredError:
        source = None
    document = _document(folder, kind, source)
    if as_json:
        report.print_json(document)
    else:
        _print(document, source)


def _document(folder: Folder, kind: str, source: Source | None) -> dict[str, Any]:
    from dataclasses import asdict

    sizes = [ref.nbytes for ref in folder.tensors.values()]
    document: dict[str, Any] = {
        "path": str(folder.path),
        "kind": kind,
        "tensors": len(folder.tensors),
        "parameters": sum(ref.numel for ref in folder.tensors.values()),
        "bytes": sum(sizes),
        "dtypes": _count(ref.dtype for ref in folder.tensors.values()),
        "model_type": folder.config.get("model_type"),
        "unreadable": folder.unusable,
        "matrices": _matrices(folder, source),
    }
    if source is not None:
        document["coverage"] = asdict(source.coverage)
        document["notes"] = sorted({delta.note for delta in source if delta.note})
    else:
        document["warnings"] = folder.warnings
    return document


def _matrices(folder: Folder, source: Source | None) -> list[dict[str, Any]]:
    from spectra import naming

    if source is None:
        return [
            {"name": name, "role": naming.role_of(name), "layer": naming.layer_of(name), "shape": ref.shape}
            for name, ref in folder.tensors.items()
            if len(ref.shape) >= 2
        ]
    return [
        {
            "name": delta.name,
            "role": delta.role,
            "layer": delta.layer,
            "shape": delta.shape,
            "max_rank": delta.max_rank,
            "factored": delta.factored,
            "status": delta.status,
            "reason": delta.reason,
        }
        for delta in source
    ]


def _count(items: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _print(document: dict[str, Any], source: Source | None) -> None:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in document["dtypes"].items())
    click.echo(
        f"{document['path']}: {document['kind']}" + (f" ({document['model_type']})" if document["model_type"] else "")
    )
    click.echo(
        f"{document['tensors']} tensors ({dtypes}), {document['parameters']:,} parameters, {_size(document['bytes'])}"
    )
    roles: dict[tuple[str, str, Any, str], int] = {}
    for matrix in document["matrices"]:
        shape = "×".join(map(str, matrix["shape"])) or "?"
        key = (matrix["role"], shape, matrix.get("max_rank"), matrix.get("status", "–"))
        roles[key] = roles.get(key, 0) + 1
    click.echo()
    report.print_table(
        ["role", "shape", "rank ≤", "status", "matrices"],
        [[role, shape, rank, status, count] for (role, shape, rank, status), count in roles.items()],
    )
    for text in document.get("notes", ()):
        click.echo(f"note: {text}")
    for text in document.get("warnings", ()):
        click.echo(f"warning: {text}")
    for name, reason in document["unreadable"].items():
        click.echo(f"unreadable: {name}: {reason}")
    if source is not None:
        click.echo()
        click.echo(str(source.coverage))
    else:
        click.echo("\nfull weights: pass --base to pair them with the model they started from")


def _size(count: int) -> str:
    from spectra.engine.memory import readable_size

    return readable_size(count)
