"""Tables on the terminal: aligned, as wide as it is, and with the columns that were asked for."""

from __future__ import annotations

import difflib
import functools
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click

from spectra import naming
from spectra.printing import printed, shortened

if TYPE_CHECKING:
    from spectra.results.tables import Row

MOST_LINES = 12  # more matrices than this are shown by role
_GAP = "  "
_PLAIN = ("step",)  # numbers that count nothing: 1000, not 1,000
_OF_ONE = ("layer",)  # numbers that name a matrix, of which there is no median
_NARROWEST = 20  # characters of a name or note, before columns go
_LONGEST_HEAD, _LONGEST_LINE = 7, 9  # characters of a heading that is not wrapped, and of a line of one that is


@dataclass(frozen=True)
class View:
    """What a command was told about its table.

    Attributes:
        columns: which to show; () for the command's own.
        sort: by which, largest first, with a + before it smallest first; "" for the order of the rows.
        every: a line for every matrix, however many there are.
    """

    columns: tuple[str, ...] = ()
    sort: str = ""
    every: bool = False

    @property
    def key(self) -> str:
        """The column to sort by; "" for none."""
        return self.sort.removeprefix("+")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The columns that the user named, to show or to sort by."""
        return tuple(filter(None, (*self.columns, self.key)))

    def check(self, there: Collection[str]) -> None:
        """Refuse what is no column, before anything is computed.

        Args:
            there: the columns that the table will have.

        Raises:
            click.UsageError: a column is not among them.
        """
        for column in self.chosen:
            if column not in there:
                similar = difflib.get_close_matches(column, there, n=3)
                meant = f"did you mean {' or '.join(similar)}?" if similar else f"there are {', '.join(there)}"
                raise click.UsageError(f"{column!r} is no column (--columns, --sort): {meant}")


def table_view(command: Callable[..., Any]) -> Callable[..., Any]:
    """--columns, --sort, --all; the command gets them as `view`."""

    @functools.wraps(command)
    def bundled(*, columns: str | None, sort: str | None, every: bool, **others: Any) -> Any:
        listed = tuple(word.strip() for word in (columns or "").split(",") if word.strip())
        return command(view=View(listed, sort or "", every), **others)

    for option in (
        click.option("--all", "every", is_flag=True, help="A line for every matrix, however many there are."),
        click.option("--sort", metavar="COLUMN", help="Sort by it, largest first; +COLUMN for smallest first."),
        click.option("--columns", metavar="A,B,…", help="Which columns to show, by their names in the csv and --json."),
    ):
        bundled = option(bundled)
    return bundled


def medians(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """A row per role with the medians over its changed matrices."""
    from spectra.results.tables import role_rows

    return role_rows(rows, columns)


@dataclass(frozen=True)
class Layout:
    """How the rows of a command become a table.

    Attributes:
        shown: column → heading, unless the user chose others.
        beside: column → heading of what stands before these where each row has a line, unless the user chose.
        behind: the same, and after them.
        first: column → heading of what each row's line begins with.
        group: column → heading of what the line of a group begins with.
        pool: the rows and the columns that are wanted → a row per group.
        pooled: the columns that a group has; None for every column of numbers.
        most: of more rows, the groups are shown.
    """

    shown: Mapping[str, str]
    beside: Mapping[str, str] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)
    first: Mapping[str, str] = field(default_factory=lambda: {"name": "matrix"})
    group: Mapping[str, str] = field(default_factory=lambda: {"role": "role", "matrices": "matrices"})
    pool: Callable[[Sequence[Row], Sequence[str]], list[Row]] = medians
    pooled: Collection[str] | None = None
    most: int = MOST_LINES

    def heading(self, column: str) -> str:
        """What a column is called."""
        return {**self.behind, **self.shown}.get(column, column)

    def groups(self, rows: Sequence[Row], view: View) -> bool:
        """Whether groups are shown: of many rows, unless a line for each or a column of single rows was asked for."""
        return not view.every and len(rows) > self.most and all(self._has(column, rows) for column in view.chosen)

    def _has(self, column: str, rows: Sequence[Row]) -> bool:
        if column in self.group:
            return True
        if self.pooled is not None:
            return column in self.pooled
        return column not in _OF_ONE and all(
            row[column] is None or isinstance(row[column], int | float) for row in rows
        )


def print_rows(rows: Sequence[Row], layout: Layout, view: View) -> bool:
    """A line per row, or per group where there are many.

    Args:
        rows: of the command's table, a matrix each.
        layout: the command's own way to show them.
        view: what the user chose.

    Returns:
        Whether groups were shown.
    """
    by_group = layout.groups(rows, view)
    columns = list(view.columns or [*layout.shown, *(() if by_group else layout.behind)])
    if by_group:
        wanted = [column for column in (*columns, view.key) if column and column not in layout.group]
        lines = layout.pool(rows, list(dict.fromkeys(wanted)))
        leading = dict(layout.group)
    else:
        lines = list(rows)
        leading = dict(layout.first) | ({} if view.columns else dict(layout.beside))
    heads = leading | {column: layout.heading(column) for column in columns}
    if view.key:
        lines = _sorted(lines, view.key, smallest_first=view.sort.startswith("+"))
    print_table(list(heads.values()), [[_plain(column, line.get(column)) for column in heads] for line in lines])
    return by_group


def _plain(column: str, value: Any) -> Any:
    return str(value) if column in _PLAIN else value


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns, text to the left and numbers to the right; on a terminal no wider than it is."""
    words = [all(value is None or isinstance(value, str) for value in column) for column in zip(*rows, strict=True)]
    columns = [
        _Column(printed(head), [_text(row[i]) for row in rows], words[i] if rows else True)
        for i, head in enumerate(header)
    ]
    said: list[str] = []
    if sys.stdout.isatty():
        columns, said = fitted(columns, shutil.get_terminal_size().columns)
    for head in zip(*(column.heads for column in columns), strict=True):
        if any(head):
            click.echo(_style(_line(head, columns), bold=True))
    for cells in zip(*(column.cells for column in columns), strict=True):
        click.echo(_line(cells, columns))
    for text in said:
        click.echo(text, err=True)


@dataclass(frozen=True)
class _Column:
    """A column as text.

    Attributes:
        head: its heading.
        cells: a text for each row.
        words: whether they stand at the left.
        wraps: whether a long heading is written in two or three lines.
    """

    head: str
    cells: Sequence[str]
    words: bool
    wraps: bool = False

    @property
    def heads(self) -> tuple[str, str, str]:
        """The heading in three lines, the last word in the third; what is not needed is empty."""
        if not self.wraps or len(self.head) <= _LONGEST_HEAD:
            return "", "", self.head
        first, _, last = self.head.rpartition("_")
        if len(first) <= _LONGEST_LINE:
            return "", first, last
        first, _, middle = first.rpartition("_")
        return first, middle, last

    @property
    def width(self) -> int:
        """Of the widest cell."""
        return max(map(len, [*self.heads, *self.cells]))


def fitted(columns: Sequence[_Column], width: int) -> tuple[list[_Column], list[str]]:
    """The same table within a width, and what had to go, in lines.

    Headings are wrapped first. Then columns go that say the same in every row, which is said below; names are cut as
    far as they stay apart, and notes; then the last columns go.
    """
    left = list(columns)
    said: list[str] = []
    if _total(left) > width:
        left = [replace(column, wraps=True) for column in left]
    for column in left[1:]:
        if _total(left) > width and column.words and len(set(column.cells)) == 1 < len(column.cells):
            left.remove(column)
            said += [f"in every row: {column.head} {column.cells[0]}"] if column.cells[0] else []
    gone: list[str] = []
    while len(left) > 2 and _total(_cut(left, 0)) > width:
        gone.insert(0, left.pop().head)
    said += [f"not shown at this width: {', '.join(gone)}; a wider terminal or a pipe has all"] if gone else []
    return _cut(left, width), said


def _total(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + len(_GAP) * (len(columns) - 1)


def _cut(columns: Sequence[_Column], width: int) -> list[_Column]:
    """The columns with notes, then names cut as far as it takes and as can be."""
    cut = list(columns)
    for place in reversed([i for i, column in enumerate(columns) if column.words]):
        while _total(cut) > width and (less := _narrower(cut[place], names=place == 0)) is not None:
            cut[place] = less
    return cut


def _narrower(column: _Column, *, names: bool) -> _Column | None:
    """A column of words one step narrower; None where it is as narrow as it may be, or names would look alike."""
    cells = list(column.cells)
    if names and all(cell.endswith(".weight") for cell in cells):
        return replace(column, cells=[cell.removesuffix(".weight") for cell in cells])
    if names and len({cell.partition(".")[0] for cell in cells}) == 1 and all(cell.count(".") > 2 for cell in cells):
        return replace(column, cells=[cell.partition(".")[2] for cell in cells])
    width = max(map(len, cells)) - 1
    shorter = [shortened(cell, width) for cell in cells]
    if width < _NARROWEST or len(set(shorter)) < len(set(cells)):
        return None
    return replace(column, cells=shorter)


def _line(cells: Sequence[str], columns: Sequence[_Column]) -> str:
    aligned = [
        cell.ljust(column.width) if column.words else cell.rjust(column.width)
        for cell, column in zip(cells, columns, strict=True)
    ]
    return _GAP.join(aligned).rstrip()


def _style(text: str, **how: Any) -> str:
    """The text in colour where a terminal shows it and NO_COLOR does not forbid it."""
    return click.style(text, **how) if colours(sys.stdout) else text


def colours(stream: Any) -> bool:
    """Whether to write colours there (https://no-color.org)."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else printed(value)


def _sorted(rows: list[Row], key: str, *, smallest_first: bool) -> list[Row]:
    """Rows by a column, words by the alphabet and roles as the model has them; those without a value last."""
    missing = [row for row in rows if row[key] is None or row[key] != row[key]]
    known = [row for row in rows if row[key] is not None and row[key] == row[key]]
    if key == "role":
        roles = naming.in_model_order(row[key] for row in known)
        return sorted(known, key=lambda row: roles.index(row[key])) + missing
    words = any(isinstance(row[key], str) and not row[key][:1].isdigit() for row in known)
    return sorted(known, key=lambda row: _order(row[key]), reverse=not smallest_first and not words) + missing


def _order(value: Any) -> Any:
    """What a value is sorted by: layers.2 stands before layers.10."""
    if not isinstance(value, str):
        return value
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", value))]
