"""How nouns show themselves: numbers and lists in words, and in a notebook a plain table.

Names and reasons come from files, so everything is escaped. There are no colours, so a dark theme stays dark.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from spectra import naming
from spectra.printing import printed

Row = Sequence[object]

_LONGEST = 400  # characters of a cell; a name in a file can be as long as its author likes
_ROWS = 24  # of a table that groups
_ROLES = 8  # on one line
_LINES = 5  # warnings and notes
_WHOLE = 1e9  # below which whole numbers are written in full
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})  # controls, formats (bidi), surrogates, private, separators


def size(shape: Sequence[int]) -> str:
    """A shape as people write it.

    >>> size((384, 1536)), size(())
    ('384×1536', '?')
    """
    return "×".join(map(str, shape)) or "?"


def matrices(count: int) -> str:
    """A number of matrices in words.

    >>> matrices(1), matrices(1200)
    ('1 matrix', '1,200 matrices')
    """
    return f"{count:,} {'matrix' if count == 1 else 'matrices'}"


def contents(names: Sequence[str]) -> str:
    """How many matrices there are, and how many of each role, the most frequent first.

    >>> contents(["layers.0.q_proj.weight", "layers.0.v_proj.weight", "layers.1.q_proj.weight"])
    '3 matrices: 2 q_proj, 1 v_proj'
    """
    counts = Counter(printed(naming.role_of(name)) for name in names)
    listed = [f"{count} {role}" for role, count in counts.most_common(_ROLES)]
    told = ", ".join(listed + ["…"] * (len(counts) > _ROLES))
    return f"{matrices(len(names))}{': ' if told else ''}{told}"


def number_range(numbers: Sequence[int]) -> int | str:
    """One number, or the lowest and the highest.

    >>> number_range([3, 8, 5])
    '3 – 8'
    """
    low, high = min(numbers), max(numbers)
    return low if low == high else f"{low} – {high}"


def with_reason(status: str, reason: str) -> str:
    """A status and, where there is one, its reason."""
    return f"{status}: {reason}" if reason else status


def first_lines(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - _LINES
    return [*lines[:_LINES], *([f"… and {more:,} more"] if more > 0 else [])]


def visible(name: str) -> str:
    r"""Text from a file with what cannot be seen, or turns the reading direction, written out.

    >>> visible("a\u202eb\x00.weight"), visible("ΔW é 層")
    ('a\\u202eb\\x00.weight', 'ΔW é 層')
    """
    if name.isascii() and name.isprintable():
        return name
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _UNSEEN else character
        for character in name
    )


def figure(value: object) -> str:
    """A number to four digits, a whole one in full; a dash where there is none.

    >>> figure(0.0123456), figure(93.0), figure(90868376), figure(None), figure(float("nan"))
    ('0.01235', '93', '90,868,376', '–', '–')
    """
    if not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    return f"{int(value):,}" if value == int(value) and abs(value) < _WHOLE else f"{value:.4g}"


def page(
    heading: str,
    facts: Mapping[str, object],
    columns: Sequence[str] = (),
    rows: Sequence[Row] = (),
    lines: Sequence[str] = (),
) -> str:
    """Heading, label → text, a table, and lines below it; what is empty is left out."""
    blocks = [f"<p><b>{_text(heading)}</b></p>"]
    told = [f"<tr>{_cell(label, 'th')}{_cell(value)}</tr>" for label, value in facts.items() if value != ""]
    blocks += [_table("", told)] if told else []
    if rows:
        head = "".join(_cell(column, "th", like=value) for column, value in zip(columns, rows[0], strict=True))
        shown = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:_ROWS]]
        if len(rows) > _ROWS:
            shown.append(f'<tr><td colspan="{len(columns)}">… and {len(rows) - _ROWS:,} more rows</td></tr>')
        blocks.append(_table(f"<tr>{head}</tr>", shown))
    blocks += [f"<p>{_text(line)}</p>" for line in lines]
    return f"<div>{''.join(blocks)}</div>"


def _table(head: str, rows: Sequence[str]) -> str:
    return f"<table>{f'<thead>{head}</thead>' if head else ''}<tbody>{''.join(rows)}</tbody></table>"


def _cell(value: object, tag: str = "td", *, like: object = None) -> str:
    """One cell, numbers at the right; a heading stands where the value below it does."""
    side = "right" if isinstance(value if like is None else like, int) else "left"
    return f'<{tag} style="text-align: {side}">{_text(value)}</{tag}>'


def _text(value: object) -> str:
    text = printed(value)
    return html.escape(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
