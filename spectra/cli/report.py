"""What reaches the terminal: short tables on stdout, notes on stderr, strict JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from spectra.deltas.source import Source

_MOST_NAMES = 5


def print_json(document: dict[str, Any]) -> None:
    """One strict JSON document on stdout: NaN and infinities become null."""
    from spectra.results.tables import strict

    click.echo(json.dumps(strict(document), indent=1, allow_nan=False, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns, text to the left and numbers to the right."""
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    is_text = [all(isinstance(row[i], str) for row in rows) for i in range(len(header))]
    for line in [list(header), *cells]:
        aligned = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ]
        click.echo("  ".join(aligned).rstrip())


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(text, err=True)


def draw(out: str, *, names: Sequence[str], sides: Sequence[str] = ()) -> list[Path]:
    """Draw these matrices of a results directory into it, say what does not fit, and give the files."""
    from spectra.metrics.similarity import SIDES
    from spectra.plots import draw_results

    drawn = draw_results(out, names=names, sides=sides or SIDES)
    for line in drawn.notes:
        note(line)
    return list(drawn.files)


def coverage_notes(coverage: Any, shown: int = _MOST_NAMES) -> None:
    """Warnings in full; what was not used as counts with a few names. `inspect` lists everything."""
    for warning in coverage.warnings:
        note(f"warning: {warning}")
    for key, title in (
        ("base_only", "only in the base"),
        ("tuned_only", "only in the tuned model"),
        ("shape_mismatch", "of another shape"),
        ("unsupported", "not supported or unreadable"),
        ("skipped", "skipped"),
    ):
        by_reason(title, getattr(coverage, key), shown)


def by_reason(title: str, listed: Mapping[str, str], shown: int = _MOST_NAMES) -> None:
    """Names that share a reason on one line with it, the first reasons only."""
    reasons: dict[str, list[str]] = {}
    for name, reason in listed.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in list(reasons.items())[:shown]:
        names_shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        note(f"{title}: {reason}: {names_shown}")
    if len(reasons) > shown:
        note(f"{title}: {len(reasons) - shown} more reasons; spectra inspect lists them")


def progress(total: int, what: str, unit: str = "matrix") -> Any:
    """A bar with ETA on a terminal's stderr; nothing in a pipe."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=None, leave=False, dynamic_ncols=True)


def heading(source: Source) -> dict[str, Any]:
    """What every document about one source begins with."""
    from spectra._version import __version__

    return {"spectra": __version__, "kind": source.kind, "tuned": source.tuned, "base": source.base}


def keep_table(out: str, name: str, document: dict[str, Any]) -> None:
    """Write a document's matrices as csv and all of it as json into a directory, and say so.

    Raises:
        StoreError: it cannot be written to.
    """
    from spectra.results.store import write
    from spectra.results.tables import strict, to_csv

    paths = Path(out, f"{name}.csv"), Path(out, f"{name}.json")
    write(paths[0], to_csv(document["matrices"]).encode())
    write(paths[1], json.dumps(strict(document), indent=1, allow_nan=False, ensure_ascii=False).encode())
    note(f"results: {paths[0]}, {paths[1]}")


def close(rows: Sequence[dict[str, Any]], done: Sequence[str] = ("ok", "unchanged")) -> None:
    """Notes of the rows, what could not be done, and exit status 1 if there is any."""
    for said in sorted({row["note"] for row in rows if row["note"]}):
        note(f"note: {said}")
    undone = [row for row in rows if row["status"] not in done]
    for row in undone:
        note(f"not done: {row['name']}: {row['status']}: {row['reason']}")
    if undone:
        note(f"{len(undone)} of {len(rows)} matrices could not be done")
        sys.exit(1)
