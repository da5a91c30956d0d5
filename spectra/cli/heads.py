"""`spectra heads`: are the heads of a multi-head LoRA alike?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from spectra import naming
from spectra.cli import report
from spectra.cli.heavy import heavy_imports
from spectra.cli.options import (
    Opening,
    download_option,
    figures_options,
    json_option,
    layer_option,
    scale_option,
    table_option,
)
from spectra.cli.table import Layout, View, print_rows, table_view

if TYPE_CHECKING:
    from spectra.results.tables import Row


@click.command("heads", short_help="Are the heads of a multi-head LoRA alike?")
@click.argument("adapter")
@click.option("--base", metavar="BASE", help="The model it belongs to, where its names need one.")
@layer_option
@scale_option
@download_option
@table_option
@figures_options
@json_option
@table_view
def command(
    adapter: str,
    base: str | None,
    layers: tuple[str, ...],
    scale: float | None,
    download: bool,
    out: str | None,
    figures: str | None,
    as_json: bool,
    view: View,
) -> None:
    """The mean pairwise cosine of an adapter's heads B₁, B₂, … by role and depth, and their norms.

    ADAPTER is an R-LoRA, a HydraLoRA, a MultiLoRA or another with several heads per module. "of ΔW" is the cosine of
    the heads' own updates B·A, which does not depend on the basis that A is given in.
    """
    with heavy_imports():
        from spectra.results.heads import COLUMNS, head_rows, heads_of

    view.check(COLUMNS)
    source = Opening(layers, "each", scale, split=True, download=download).opened(adapter, base)
    source = source.select(layers) if layers else source
    modules = heads_of(source)  # an adapter without heads is refused before anything is said of it
    report.coverage_notes({adapter: source.coverage})
    rows: list[Row] = []
    with report.progress(len(modules), "spectra heads") as bar:
        for row in head_rows(source):
            rows.append(row)
            bar.update()
    document = {**report.heading(source), "coverage": asdict(source.coverage), "matrices": rows}
    if out:  # before anything is printed, which may end with the pipe that reads it
        report.keep_table(out, "heads", document)
        report.figures(report.draw(out, names=(), size=figures) if figures else [])
    if as_json:
        report.print_json(document)
    else:
        _print(rows, view)
    report.close(rows)


def _print(rows: list[Row], view: View) -> None:
    layout = Layout(
        shown={"heads": "heads", "cosine": "cosine", "chance": "chance ±", "norm": "‖B‖_F", "update_cosine": "of ΔW"},
        first={"name": "module"},
        group={"role": "role", "modules": "modules"},
        pool=_means,
    )
    if print_rows([row for row in rows if row["status"] == "ok"], layout, view):
        report.note(
            "means over the modules of a role, as the papers give them; --all, --out and --json have every module"
        )


def _means(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    roles: dict[str, list[Row]] = {}
    for row in rows:
        roles.setdefault(row["role"], []).append(row)
    return [
        {"role": role, "modules": len(roles[role]), **{column: _mean(roles[role], column) for column in columns}}
        for role in naming.in_model_order(roles)
    ]


def _mean(rows: list[Row], key: str) -> Any:
    values = [row[key] for row in rows if row[key] == row[key]]  # NaN of heads that are zero
    if not values:
        return float("nan")
    same = len(set(values)) == 1
    return values[0] if same else sum(values) / len(values)
