"""`spectra extract`: an update written as a LoRA."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.heavy import heavy_imports
from spectra.cli.options import (
    Compute,
    HeadsType,
    bring,
    compute_options,
    download_option,
    files_of,
    json_option,
    layer_option,
    of_one_version,
    scale_option,
    within_reach,
)
from spectra.cli.table import Layout, View, print_rows, table_view
from spectra.extraction.options import DTYPES, FORMATS, DType, Format, Options

_SHOWN = ("rank", "relative_error", "parameters")

if TYPE_CHECKING:
    from spectra.deltas.source import Source
    from spectra.extraction.extract import Extraction, Row
    from spectra.results.collection import Spectra


class _WeightsCommand(click.Command):
    """A command whose --weights takes all the numbers that follow it, negative ones, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spell `--weights .5 -.5` as click has it: `--weights=.5 --weights=-.5`."""
        spelled: list[str] = []
        following = False
        for word in args:
            following = word == "--weights" or (following and _is_number(word))
            if word != "--weights":
                spelled.append(f"--weights={word}" if following else word)
        return super().parse_args(ctx, spelled)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@click.command("extract", short_help="Write an update as a LoRA.", cls=_WeightsCommand)
@click.argument("given", metavar="TUNED…", nargs=-1, type=click.Path())
@click.option("--base", type=click.Path(), metavar="BASE", help="The model it started from: path, hub id or alias.")
@click.option(
    "--tuned",
    multiple=True,
    metavar="TUNED",
    type=click.Path(),
    help="TUNED, written as an option: a model, an adapter, or results of svd --top --out. Several are added up.",
)
@click.option(
    "--weights", type=float, multiple=True, metavar="W W …", help="What each TUNED is multiplied by.  [default: 1 each]"
)
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="One rank for all matrices.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="E",
    help="The share of Σσ² that each matrix keeps, such as 0.9.",
)
@click.option(
    "--parameters",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many parameters the adapter may have: ranks that lose least in total.",
)
@click.option("--above-noise", is_flag=True, help="Keep the values above storage rounding.")
@click.option("--out", type=click.Path(), metavar="DIR", help="The adapter's folder, which must not exist yet.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(FORMATS),
    default="peft",
    show_default=True,
    help="Whose files to write.",
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="What the factors are stored in."
)
@click.option(
    "--save-modules", is_flag=True, help="Keep modules whole whose vectors changed, such as norms, and changed biases."
)
@click.option("--dry-run", is_flag=True, help="Print ranks and errors, and write nothing.")
@layer_option
@click.option(
    "--heads",
    type=HeadsType(),
    default="mean",
    show_default=True,
    metavar="mean|sum|N",
    help="What multi-head adapters stand for.",
)
@scale_option
@download_option
@compute_options
@json_option
@table_view
def command(
    given: tuple[str, ...],
    base: str | None,
    tuned: tuple[str, ...],
    weights: tuple[float, ...],
    rank: int | None,
    energy: float | None,
    parameters: int | None,
    above_noise: bool,
    out: str | None,
    file_format: Format,
    dtype: DType,
    save_modules: bool,
    dry_run: bool,
    layers: tuple[str, ...],
    heads: str | int,
    scale: float | None,
    download: bool,
    compute: Compute,
    as_json: bool,
    view: View,
) -> None:
    """Write the update ΔW = tuned − base as a LoRA: the best approximation of each rank, matrix by matrix.

    Choose the ranks by one of --rank, --energy, --parameters and --above-noise. The error is known before anything is
    written (--dry-run), and what a LoRA cannot hold is listed.
    """
    tuned = (*given, *tuned)
    _check_usage([rank, energy, parameters, above_noise or None], tuned, weights, out, dry_run)
    _check_view(view)
    if save_modules and file_format != "peft":
        raise click.UsageError("--save-modules needs --format peft: kohya's files keep no module whole")
    updates = _given(tuned, base, layers, {"heads": heads, "scale": scale, "split": bool(layers)}, download)
    for source in updates if download and isinstance(updates, list) else ():
        bring((source.tuned, source.base), files_of(source, ()))
    with heavy_imports():
        from spectra.extraction.extract import run
        from spectra.extraction.inputs import inputs_of
        from spectra.extraction.ranks import Rule

    rule = Rule(rank, energy, parameters, above_noise)
    options = Options(file_format, dtype, save_modules)
    with compute.keywords() as keywords:
        inputs = inputs_of(updates, weights or None, **keywords)
        with report.progress(len(inputs.gathered.weights), "spectra extract", otherwise="nothing was written") as bar:
            extraction = run(inputs, None if dry_run else out, rule, options, bar.update)
    if as_json:
        report.print_json(_document(extraction, tuned, base, None if dry_run else out, options.format, dtype))
    else:
        _print(extraction.rows, view)
    _close(extraction, None if dry_run else out)


def _check_usage(
    rules: Sequence[Any], tuned: Sequence[str], weights: Sequence[float], out: str | None, dry_run: bool
) -> None:
    given = sum(rule is not None for rule in rules)
    if not tuned:
        raise click.UsageError("TUNED is missing: the tuned model or adapter (or --tuned)")
    if given != 1:
        many = "none" if not given else f"{given}"
        raise click.UsageError(f"{many} of --rank, --energy, --parameters and --above-noise given: choose one")
    if out is None and not dry_run:
        raise click.UsageError("--out names the adapter's folder; --dry-run writes nothing")
    if weights and len(weights) != len(tuned):
        raise click.UsageError(f"{len(weights)} --weights for {len(tuned)} --tuned: give each its own")


def _check_view(view: View) -> None:
    if view.chosen:
        from dataclasses import fields

        from spectra.extraction.extract import Row

        view.check([*(item.name for item in fields(Row)), "role", "layer"])


def _given(
    tuned: Sequence[str], base: str | None, layers: Sequence[str], settings: dict[str, Any], download: bool
) -> list[Source] | Spectra:
    """What --tuned means: the results of a run, or updates to add up."""
    from spectra.sources import open_source

    if len(tuned) == 1 and (Path(tuned[0]) / "run.json").is_file():
        from spectra.results.collection import load

        spectra = load(tuned[0])
        return spectra.select(layers) if layers else spectra
    sources = []
    shared = of_one_version(within_reach(base, download) if base else None, tuned)
    for each in tuned:
        source = open_source(within_reach(each, download), shared, **settings)
        for line in source.coverage.warnings:
            report.warning(f"warning: {line}")
        report.lacking(source.lacking(layers))
        sources.append(source.select(layers) if layers else source)
    return sources


def _document(
    extraction: Extraction, tuned: Sequence[str], base: str | None, out: str | None, file_format: str, dtype: str
) -> dict[str, Any]:
    from dataclasses import asdict

    from spectra._version import __version__
    from spectra.extraction.ranks import total_error

    return {
        "spectra": __version__,
        "tuned": list(tuned),
        "base": base,
        "out": out,
        "format": file_format,
        "dtype": dtype,
        "parameters": sum(row.parameters for row in extraction.rows),
        "relative_error": total_error(extraction.rows),
        "matrices": [asdict(row) for row in extraction.rows],
        "not_carried": extraction.not_carried,
        "modules_to_save": extraction.whole,
    }


def _print(rows: Sequence[Row], view: View) -> None:
    """A line per matrix, or per role where there are many."""
    from dataclasses import asdict

    from spectra import naming

    def pool(lines: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
        roles: dict[str, list[Row]] = {}
        for row in rows:
            roles.setdefault(naming.role_of(row.name), []).append(row)
        return [{"role": role, **_total(roles[role])} for role in naming.in_model_order(roles)]

    layout = Layout(
        shown={column: column for column in _SHOWN},
        behind={"dtype_error": "dtype_error", "clamped": "clamped"},
        pool=pool,
        pooled=_SHOWN,
    )
    lines = [asdict(row) | {"role": naming.role_of(row.name), "layer": naming.layer_of(row.name)} for row in rows]
    if print_rows(lines, layout, view):
        report.note("errors over all matrices of a role; --all lists every matrix, and so does --json")


def _total(rows: Sequence[Row]) -> dict[str, Any]:
    """What is said of all matrices of a role."""
    from spectra import text
    from spectra.extraction.ranks import total_error

    return {
        "matrices": len(rows),
        "rank": str(text.number_range([row.rank for row in rows])),
        "relative_error": total_error(rows),
        "parameters": sum(row.parameters for row in rows),
    }


def _close(extraction: Extraction, out: str | None) -> None:
    """What was written and what was not, and the exit status."""
    from spectra.extraction.ranks import total_error

    for text in sorted({row.note for row in extraction.rows if row.note}):
        report.note(f"note: {text}")
    clamped = [row for row in extraction.rows if row.clamped]
    if clamped:
        report.note(f"note: {clamped[0].name}: {clamped[0].clamped} ({len(clamped)} matrices)")
    report.by_reason("not carried", extraction.not_carried)
    for module in extraction.whole[:1]:
        report.note(f"kept whole: {module} ({len(extraction.whole)} modules)")
    parameters = sum(row.parameters for row in extraction.rows)
    worst = max((row.dtype_error for row in extraction.rows if row.dtype_error == row.dtype_error), default=0.0)
    report.note(
        f"{parameters:,} parameters, relative error {total_error(extraction.rows):.4g}"
        + (f", and at most {worst:.1e} more in a matrix from storing it" if worst else "")
    )
    report.note(f"adapter: {out}" if out else "nothing was written (--dry-run)")
    if extraction.undone:
        report.warning(
            f"{len(extraction.undone)} of {len(extraction.undone) + len(extraction.rows)} matrices could not be done"
        )
        sys.exit(1)
