"""What reaches the terminal: short tables on stdout, notes on stderr, strict JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectra.cli import table, talk
from spectra.cli.progress import Progress
from spectra.cli.talk import is_quiet, is_verbose, say
from spectra.printing import printed, printed_json, strict

if TYPE_CHECKING:
    from spectra.cli.drawing import DrawingProcess
    from spectra.deltas.source import Coverage, Source
    from spectra.spectrum import Spectrum

_MOST_REASONS = 5


def print_json(document: dict[str, Any]) -> None:
    """One strict JSON document on stdout: NaN and infinities become null."""
    plain = str(getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "") != "utf8"
    click.echo(printed_json(json.dumps(strict(document), indent=1, allow_nan=False, ensure_ascii=plain)))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns, text to the left and numbers to the right; on a terminal no wider than it is."""
    table.print_table(header, rows)


def note(text: str) -> None:
    """One line on stderr, which -q leaves away."""
    if not is_quiet():
        say(printed(text), err=True)


def warning(text: str) -> None:
    """One line on stderr that is always said: a result is missing, or does not mean what it seems to."""
    line = printed(text)
    click.echo(click.style(line, fg="yellow") if table.colours(sys.stderr) else line, err=True)


def draw(
    out: str,
    *,
    names: Sequence[str],
    size: str,
    sides: Sequence[str] = (),
    finished: bool = False,
    held: Iterable[Spectrum] = (),
    process: DrawingProcess | None = None,
) -> list[Path]:
    """Draw these matrices of a results directory into it, say what does not fit, and give the files.

    Args:
        out: the directory.
        names: of the matrices.
        size: of the figures.
        sides: of comparisons; () for both.
        finished: nothing was computed: where nothing can be written, the figures that are there are left as they are.
        held: spectra that are stored there and are at hand: they are not read again.
        process: draws them, if it can.
    """
    from spectra.cli.drawing import USUAL
    from spectra.metrics.similarity import SIDES

    if finished and not os.access(out, os.W_OK):
        note(f"figures are left as they are: {out} cannot be written to")
        return []
    options = {"names": names, "sides": sides or SIDES, "size": size, "held": held}
    drawn = process and process.draw(out, [options | {"kinds": (kind,)} for kind in USUAL])
    files, notes = drawn or _drawn_here(out, options)
    for line in notes:
        note(line)
    return files


def _drawn_here(out: str, options: dict[str, Any]) -> tuple[list[Path], list[str]]:
    from spectra.plots import draw_results

    drawn = draw_results(out, **options)
    return list(drawn.files), list(drawn.notes)


def figures(paths: Iterable[Path]) -> None:
    """Say which figures were written."""
    for path in paths:
        note(f"figure: {path}")


def coverage_notes(coverages: Mapping[str, Coverage]) -> None:
    """Warnings in full; what was not used as counts with a few names. `inspect` lists everything.

    What lacks the base alone is not among it, since `lacking` says that.

    Args:
        coverages: what each update is called → what was not used of it. A line that is true of all of them is said
            once; one that is not begins with the update's name.
    """
    lines: dict[tuple[bool, str], list[str]] = {}
    for update, coverage in coverages.items():
        for said in _coverage_lines(coverage):
            lines.setdefault(said, []).append(update)
    for (warns, line), updates in lines.items():
        of = "" if len(updates) == len(coverages) else f"{few(updates)}: "
        (warning if warns else note)(f"warning: {of}{line}" if warns else f"{of}{line}")


def _coverage_lines(coverage: Coverage) -> list[tuple[bool, str]]:
    """What is said of one update, each with whether it is a warning."""
    from spectra.deltas.source import SAVED_WHOLE

    lines = [(True, line) for line in coverage.warnings]
    for key, title in (
        ("base_only", "only in the base"),
        ("tuned_only", "only in the tuned model"),
        ("shape_mismatch", "of another shape"),
        ("unsupported", "not supported or unreadable"),
        ("skipped", "skipped"),
    ):
        listed = {name: reason for name, reason in getattr(coverage, key).items() if reason != SAVED_WHOLE}
        lines += [(False, line) for line in _lines_by_reason(title, listed)]
    return lines


def lacking(names: Sequence[str]) -> None:
    """Say what of the wanted matrices is not there for want of the base; the command ends with status 1 then."""
    from spectra.deltas.source import SAVED_WHOLE

    if names:
        warning(f"not done: {few(names, 1)}: {SAVED_WHOLE}")
        talk.leave_undone()


def by_reason(title: str, listed: Mapping[str, str]) -> None:
    """Names that share a reason on one line with it, the first reasons only."""
    for line in _lines_by_reason(title, listed):
        note(line)


def _lines_by_reason(title: str, listed: Mapping[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in listed.items():
        reasons.setdefault(reason, []).append(name)
    shown, named = (len(reasons), len(listed)) if is_verbose() else (_MOST_REASONS, 2)
    lines = [f"{title}: {reason}: {few(names, named)}" for reason, names in list(reasons.items())[:shown]]
    if len(reasons) > shown:
        lines.append(f"{title}: {len(reasons) - shown} more reasons; -v lists them")
    return lines


def few(names: Sequence[str], shown: int = 2) -> str:
    """The first names, and how many more there are.

    >>> few(["a", "b", "c"])
    'a, b and 1 more'
    """
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def progress(total: int, what: str, **options: Any) -> Progress:
    """A bar with the time left on a terminal's stderr, nothing in a pipe; the options are those of `Progress`."""
    return Progress(total, what, **options)


def reused(count: int, total: int, out: str | None, notes: Collection[str] = ()) -> None:
    """How many results were stored before, where there are any, and what was damaged."""
    if count:
        note(f"{count} of {total} reused from {out}")
    for line in notes:
        warning(f"warning: {line}")


def heading(source: Source) -> dict[str, Any]:
    """What every document about one source begins with."""
    from spectra._version import __version__

    return {"spectra": __version__, "kind": source.kind, "tuned": source.tuned, "base": source.base}


def keep_table(out: str, name: str, document: dict[str, Any]) -> None:
    """Write a document's matrices as csv and all of it as json into a directory, and say so.

    Raises:
        StoreError: it cannot be written to.
    """
    from spectra.results.tables import to_csv
    from spectra.results.writing import write

    paths = Path(out, f"{name}.csv"), Path(out, f"{name}.json")
    write(paths[0], to_csv(document["matrices"]).encode())
    write(paths[1], printed_json(json.dumps(strict(document), indent=1, allow_nan=False, ensure_ascii=False)).encode())
    note(f"results: {paths[0]}, {paths[1]}")


def unrelated(rows: Sequence[dict[str, Any]]) -> None:
    """One warning for the rows that say of themselves that they are no update."""
    from spectra.deltas.relatedness import UNRELATED_NOTE

    those = [row for row in rows if UNRELATED_NOTE in row["note"]]
    if those:
        warning(f"warning: {len(those)} of {len(rows)} rows, such as {those[0]['name']}: {UNRELATED_NOTE}")


def note_of(row: dict[str, Any]) -> str:
    """What a row says of itself, without what `unrelated` says of it."""
    from spectra.deltas.relatedness import UNRELATED_NOTE

    return "; ".join(said for said in row["note"].split("; ") if said != UNRELATED_NOTE)


def close(rows: Sequence[dict[str, Any]], done: Sequence[str] = ("ok", "unchanged")) -> None:
    """Notes of the rows, what could not be done, and exit status 1 if there is any."""
    for said in sorted({*map(note_of, rows)} - {""}):
        note(f"note: {said}")
    unrelated(rows)
    undone = [row for row in rows if row["status"] not in done]
    for row in undone:
        warning(f"not done: {row['name']}: {row['status']}: {row['reason']}")
    if undone:
        warning(f"{len(undone)} of {len(rows)} matrices could not be done")
        sys.exit(1)
