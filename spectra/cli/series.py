"""`spectra series`: the update along training, checkpoint by checkpoint."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import report
from spectra.cli.heavy import heavy_imports
from spectra.cli.options import (
    Compute,
    Opening,
    compute_options,
    result_options,
    source_options,
    within_reach,
)
from spectra.cli.table import Layout, View, print_rows, table_view

if TYPE_CHECKING:
    from spectra.deltas.source import Coverage, Source
    from spectra.metrics.similarity import Side
    from spectra.results.tables import Row

_SHOWN = {
    "norm": "norm",
    "stable_rank": "stable rank",
    "top_1_share": "top 1",
    "effective_rank": "eff. rank",
    "phi_to_last": "φ last",
    "phi_to_previous": "φ before",
    "start_left": "start L",
    "start_right": "start R",
}
_MOST_NOTES = 4


@click.command("series", short_help="The update along training, checkpoint by checkpoint.")
@click.argument("checkpoints", metavar="CKPT…", nargs=-1, type=click.Path())
@click.option(
    "--base", type=click.Path(), metavar="BASE", help="The model that training started from; most adapters need none."
)
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, metavar="K",
              help="How many directions φ and the start's shares compare.")  # fmt: skip
@click.option("--side", type=click.Choice(["left", "right"]), default="left", show_default=True, help="Vectors of φ.")
@click.option("--start", type=click.Path(), metavar="ADAPTER",
              help="The adapter as it was saved before training.  [default: the first checkpoint]")  # fmt: skip
@click.option("--step", "steps", type=click.IntRange(min=0), multiple=True, metavar="N",
              help="The step of each CKPT, in order.  [default: trainer_state.json, or the names]")  # fmt: skip
@source_options
@compute_options
@result_options
@table_view
def command(
    checkpoints: tuple[str, ...],
    base: str | None,
    top: int,
    side: Side,
    start: str | None,
    steps: tuple[int, ...],
    opening: Opening,
    compute: Compute,
    out: str | None,
    figures: str | None,
    as_json: bool,
    view: View,
) -> None:
    """The update ΔW along training: norms, ranks and directions, from the first checkpoint to the last.

    CKPT… are full models or adapters of one run, in any order. Prints medians by step and role: φ to the
    last checkpoint and to the one before, and how much of the energy lies in the start's directions. With
    --out everything is kept, and the same command with new checkpoints decomposes only those; without any
    CKPT it shows what is there.
    """
    if not checkpoints and not out:
        raise click.UsageError("give the checkpoints of one run, or --out with what is stored")
    with heavy_imports():
        from spectra.results.series import count_new, series_rows
        from spectra.results.series_table import COLUMNS

    view.check(COLUMNS)
    rows: list[Row] = []
    notes, reused = _Notes(opening), list[str]()
    new = count_new(checkpoints, steps or None, out)
    telling: dict[str, Any] = {"plans": new, "kept": out or "", "parts": partial(_stored, out)}
    with report.progress(len(checkpoints), "spectra series", **telling) as bar, compute.keywords() as keywords:
        stream = series_rows(
            checkpoints, base, layers=opening.layers, top=top, side=side, steps=steps or None, start=start, out=out,
            reach=partial(within_reach, download=opening.download), opened=notes.see, notes=notes.warnings,
            reused=reused, **opening.settings, **keywords,
        )  # fmt: skip
        for row in stream:
            if not rows or rows[-1]["step"] != row["step"]:
                bar.update()
            rows.append(row)
    report.reused(len(reused), sum(bool(row["name"]) for row in rows), out)
    notes.print()
    written = report.draw(out, names=(), size=figures) if out and figures else []
    if as_json:
        report.print_json(_document(rows, base, {"top": top, "side": side}))
    else:
        _print(rows, view)
    _close(rows, checkpoints, out, written)


def _stored(out: str | None) -> str:
    """How many matrices are stored, of checkpoints that are finished or not."""
    from spectra.results.series_table import stored_steps
    from spectra.text import matrices

    each = [len(list((folder / "spectra").glob("*.safetensors"))) for folder in stored_steps(Path(out or "")).values()]
    return f"{matrices(sum(each))} of {len(each)} checkpoints" if any(each) else ""


class _Notes:
    """What the checkpoints' coverage says: the last one's in full, of the others what it warns of besides."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.source: Source | None = None
        self.first: Coverage | None = None
        self.warnings: list[str] = []

    def see(self, source: Source) -> Source:
        """One more checkpoint was opened; as it is read next."""
        if self.first is None:
            self.first, self.source = source.coverage, source
        else:
            said = {*self.first.warnings, *self.warnings}
            self.warnings += [line for line in source.coverage.warnings if line not in said]
        return self.opening.brought(source)

    def print(self) -> None:
        """Say it, when the bar is gone."""
        if self.first is not None:
            report.coverage_notes({"": self.first})
        if self.source is not None:
            report.lacking(self.source.lacking(self.opening.layers))
        for line in self.warnings:
            report.warning(f"warning: {line}")


def _document(rows: list[Row], base: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from spectra._version import __version__

    checkpoints: dict[int, dict[str, Any]] = {}
    for row in rows:
        said = {"step": row["step"], "checkpoint": row["checkpoint"]}
        problem = {"status": "unreadable", "reason": row["reason"]}
        checkpoints[row["step"]] = said | ({"status": "ok", "reason": ""} if row["name"] else problem)
    return {
        "spectra": __version__,
        "kind": "series",
        "base": base,
        "options": options,
        "checkpoints": list(checkpoints.values()),
        "matrices": [row for row in rows if row["name"]],
    }


def _print(rows: list[Row], view: View) -> None:
    from spectra.results.series_table import by_role

    layout = Layout(
        shown=_SHOWN,
        first={"step": "step", "name": "matrix"},
        group={"step": "step", "role": "role", "matrices": "matrices"},
        pool=by_role,
        most=0,
    )
    grouped = print_rows([row for row in rows if row["name"]], layout, view)
    table = by_role(rows)
    if not table:
        return
    if grouped:
        report.note("medians over the changed matrices of a role; --all lists every matrix, and so do --out and --json")
    levels = [(name, [line[f"{name}_chance"] for line in table if line[f"{name}_chance"]]) for name in _SHOWN
              if f"{name}_chance" in table[0]]  # fmt: skip
    ends = [(name, f"{min(values):.2g}", f"{max(values):.2g}") for name, values in levels if values]
    told = [f"{_SHOWN[name]} {low}" + (f" – {high}" if high != low else "") for name, low, high in ends]
    if told:
        report.note(f"by chance: {', '.join(told)}")


def _close(rows: list[Row], checkpoints: tuple[str, ...], out: str | None, written: list[Path]) -> None:
    """Where things are, what could not be done, and the exit status."""
    from spectra.spectrum import DONE

    if out:
        report.note(f"results: {out}/series.csv, {out}/checkpoints/")
    report.figures(written)
    steps = {row["step"]: row["checkpoint"] for row in rows}
    others = [step for step, path in steps.items() if path not in checkpoints]
    if others and checkpoints:
        report.note(f"stored before in {out}, and part of the series: steps {', '.join(map(str, others))}")
    _missing(rows)
    report.unrelated([row for row in rows if row["name"]])
    notes = Counter(note for row in rows for note in report.note_of(row).split("; ") if note)
    for text, count in notes.most_common(_MOST_NOTES):
        report.note(f"note: {text} ({count} rows)")
    if len(notes) > _MOST_NOTES:
        report.note(f"note: {len(notes) - _MOST_NOTES} more, in the column note of --json and --out")
    undone: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] not in DONE:
            undone.setdefault((row["checkpoint"], row["status"], row["reason"]), []).append(row["name"])
    for (checkpoint, status, reason), names in undone.items():
        which = f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        report.warning(f"not done: {checkpoint}: " + (f"{which}: {status}: {reason}" if names[0] else reason))
    if undone:
        sys.exit(1)


def _missing(rows: list[Row]) -> None:
    """Which checkpoints lack matrices that others have: there is no row of those."""
    names: dict[str, set[str]] = {}
    for row in rows:
        if row["name"]:
            names.setdefault(row["checkpoint"], set()).add(row["name"])
    there = set().union(*names.values())
    for checkpoint, held in names.items():
        if held < there:
            report.warning(f"not in {checkpoint}: {len(there - held)} matrices of others, such as {min(there - held)}")
