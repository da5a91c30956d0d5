"""Figures of several panels: made for a layout, with titles in lines that fit, and one legend that covers no data."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spectra.plots.sizes import Layout, letters_in
from spectra.plots.style import look
from spectra.printing import in_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBER = re.compile(r"(?<=[^\W\d]) (?=[-−]?\d)|(?<=\d) (?=%)")  # the space before a number, or before its sign
_TITLE = 1.5  # ems of a line of a figure's title
_LINE = 1.2  # ems of a line of small text in a legend
_HANDLE = 7  # characters that a legend's line and the space between its columns take


@contextmanager
def panelled(layout: Layout, *, title: str = "", squares: bool = False) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure and its axes row by row, while they are drawn; then those that stayed empty go, and the title comes.

    Squares of heatmaps stand together, and leave no space where a panel's place is longer or wider.
    """
    from spectra.plots.canvas import ShownFigure, trim

    with look(layout.text):
        how = "compressed" if squares else "constrained"
        figure = ShownFigure(text=layout.text, figsize=layout.inches, layout=how)
        axes = list(figure.subplots(layout.rows, layout.columns, squeeze=False).flat)
        yield figure, axes
        for ax in axes:
            ax.set_visible(ax.has_data())
        told = _in_lines(title, layout.whole)
        if squares:
            trim(figure, _TITLE * layout.text / 72 * (told.count("\n") + 1) if told else 0.0)
        if told:
            figure.suptitle(in_figure(told))


def _in_lines(title: str, letters: float) -> str:
    """The figure's title, in lines that its width holds, in letters of plain text; none is blank."""
    return "\n".join(even_lines(line, int(letters / 1.2)) for line in title.splitlines() if line.strip())


def ems_of_title(title: str, width: float) -> float:
    """The height of a figure's title where the figure has this width, both in ems.

    >>> ems_of_title("", 56), ems_of_title("a run", 56), ems_of_title("a run\\nand another", 56)
    (0.0, 1.5, 3.0)
    """
    told = _in_lines(title, letters_in(width))
    return _TITLE * (told.count("\n") + 1) if told else 0.0


def above(title: str, finding: str) -> str:
    """What stands above all panels: the title that somebody chose, and below it what the numbers say."""
    return "\n".join(filter(None, [title, finding]))


def put_title(ax: Axes, title: str, layout: Layout) -> None:
    """A panel's title, small, in lines that its width holds."""
    ax.set_title(in_figure(even_lines(title, layout.letters(0.9, 0.85))), fontsize="small")


def even_lines(words: str, width: int) -> str:
    """In as few lines as the width allows, none much shorter than the others; a number stays with its word.

    >>> even_lines("one two three four five", 20)
    'one two three\\nfour five'
    >>> even_lines("in the mean over layer 5", 22)
    'in the mean\\nover layer 5'
    """
    words = _NUMBER.sub("\u00a0", words)
    fewest = len(textwrap.wrap(words, width, break_on_hyphens=False)) or 1
    least = max(max(map(len, words.split(" "))), len(words.replace(" ", "")) // fewest, 1)  # what no line can be under
    tried = (textwrap.wrap(words, space, break_on_hyphens=False) for space in (*range(least, width), width))
    return "\n".join(next(lines for lines in tried if len(lines) <= fewest)).replace("\u00a0", " ")


def unbroken(words: str) -> str:
    """The words so that no line ends within them."""
    return words.replace(" ", "\u00a0")


def put_label(ax: Axes, label: str, letters: int) -> None:
    """What a panel's vertical axis is, in lines of so many characters."""
    ax.set_ylabel(in_figure(textwrap.fill(label, letters, break_long_words=False)))


def ems_of_legend(labels: Iterable[str], width: float) -> float:
    """The height of a legend that `put_legend` puts below all panels of a figure of this width, both in ems.

    >>> ems_of_legend(["q_proj", "v_proj"], 56), ems_of_legend([f"{i}, shared expert" for i in range(9)], 30)
    (1.2, 6.0)
    """
    told = list(labels)
    columns = _columns(told, int(1.15 * letters_in(width)))
    return round(_LINE * sum(1 for _ in range(0, len(told), columns)), 1)


def _columns(labels: Sequence[str], line: int) -> int:
    """How many labels stand side by side in lines of so many characters."""
    longest = max(map(len, labels), default=0) + _HANDLE
    return max(min(len(labels), line // longest), 1)


def put_legend(figure: Figure, ax: Axes, layout: Layout) -> None:
    """The axes' legend below all panels, in as many columns as the figure's width holds; over no data."""
    put_legend_of(figure, [ax], layout)


def put_legend_of(figure: Figure, axes: Iterable[Axes], layout: Layout) -> None:
    """The same of several axes, of which each may have curves that the others lack: every label once."""
    there = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    handles, labels = list(there.values()), list(there)
    if not labels:
        return
    line = int(1.15 * layout.whole)  # characters of small text
    told = [textwrap.fill(label, line - _HANDLE) for label in labels]
    figure.legend(handles, told, loc="outside lower center", ncols=_columns(labels, line))
