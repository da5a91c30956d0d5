"""The sizes of figures: a paper's column, its page, a slide. Where panels stand and how large text is, is decided here.

Lengths of panels are in ems, multiples of the text's size: a panel that holds its words at one size holds them at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from spectra.errors import SelectionError

SizeName = Literal["column", "page", "slide"]
DEFAULT: SizeName = "page"
_LETTER = 0.55  # ems of a letter, on average
_POINTS = 72.0  # of an inch


@dataclass(frozen=True)
class Size:
    """How large a figure may be, and its text.

    Attributes:
        width: inches, which only columns that the caller insists on go beyond.
        height: inches, which only panels that would be too small to read go beyond.
        text: points, of titles and of the axes' words; what is less important is smaller.
        least: points, below which that text does not go to make panels fit.
    """

    width: float
    height: float
    text: float
    least: float

    @property
    def usual(self) -> float:
        """Its width in ems of its usual text."""
        return self.width * _POINTS / self.text

    @property
    def widest(self) -> float:
        """Its width in ems of the smallest text."""
        return self.width * _POINTS / self.least


SIZES: dict[SizeName, Size] = {
    "column": Size(3.4, 9.0, 8.0, 7.0),
    "page": Size(7.0, 9.0, 9.0, 7.0),
    "slide": Size(13.3, 7.5, 17.0, 12.0),
}


@dataclass(frozen=True)
class Layout:
    """How the panels of a figure stand.

    Attributes:
        rows: below each other.
        columns: beside each other.
        inches: width and height of the figure.
        text: points.
        panel: the width of a panel, in ems.
    """

    rows: int
    columns: int
    inches: tuple[float, float]
    text: float
    panel: float

    def letters(self, share: float = 1.0, small: float = 1.0) -> int:
        """How many characters a line has in this share of a panel's width; `small` as the text is to the usual one."""
        return max(int(share * self.panel / (_LETTER * small)), 8)

    @property
    def whole(self) -> int:
        """How many characters a line has over the whole figure."""
        return letters_in(self.inches[0] * _POINTS / self.text)


def letters_in(ems: float) -> int:
    """How many characters stand in a line so long.

    >>> letters_in(11)
    20
    """
    return int(ems / _LETTER + 1e-9)


def size_of(name: str) -> Size:
    """The size of this name.

    Raises:
        SelectionError: there is none.
    """
    for known in get_args(SizeName):
        if known == name:
            return SIZES[known]
    raise SelectionError(f"size={name!r} is not one of {', '.join(SIZES)} (--size)")


def arranged(
    size: str,
    count: int,
    panel: tuple[float, float],
    *,
    beside: float = 0.0,
    above: float = 0.0,
    columns: int | None = None,
    most: int | None = None,
    stretched: bool = False,
) -> Layout:
    """Where panels stand, so that all fit and their text is as large as the size allows.

    Args:
        size: a name of SIZES.
        count: how many panels.
        panel: the least width and the height of one, in ems.
        beside: ems that a colour bar or names take of the width once.
        above: ems that titles and legends take of the height once.
        columns: how many panels stand in a row, if that is not free.
        most: how many do at most.
        stretched: whether panels are wider where there is room.

    Raises:
        SelectionError: there is no such size.

    Example:
        >>> [(layout.rows, layout.columns) for layout in (arranged(size, 4, (24, 20)) for size in SIZES)]
        [(4, 1), (2, 2), (2, 2)]
    """
    sheet = size_of(size)
    wide, high = sheet.width * _POINTS, sheet.height * _POINTS

    def text_of(across: int) -> float:
        """How large the text may be, up to the sheet's, in this many columns."""
        down = math.ceil(count / across)
        room = min(wide / (across * panel[0] + beside), high / (down * panel[1] + above))
        return min(sheet.text, room)

    allowed = [columns] if columns else list(range(1, min(count, most or count) + 1))
    fitting = [across for across in allowed if across * panel[0] + beside <= sheet.widest] or allowed[:1]
    best = max(text_of(across) for across in fitting)
    # Of those with the largest text: no empty places, then few rows.
    like = [across for across in fitting if text_of(across) >= 0.97 * best or text_of(across) >= sheet.text]
    across = min(like, key=lambda across: (-count % across, -across))
    text = max(text_of(across), sheet.least)
    down = math.ceil(count / across)
    needed = (across * panel[0] + beside) * text / _POINTS
    inches = (max(sheet.width, needed) if stretched else needed, (down * panel[1] + above) * text / _POINTS)
    return Layout(down, across, inches, text, (inches[0] * _POINTS / text - beside) / across)
