"""Words of a page that a narrow screen may break: a name at its dots, and a number nowhere."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from spectra import text

_LONG = 20  # characters of a word up to which no line is too short for it
_PIECES = re.compile(r"(?<=[._/])(?=[^\W_])")
_SPACE = re.compile(r"((?<![=<>≤≥≈])\s+(?!%))")  # where a line may end: not in "= 0", nor in "98 %"
_TIED = re.compile(r"\S+ %[).,;:]*|[=<>≤≥≈]+ \S+")
_NUMBER = re.compile(r"[(]?[-−+]?[\d.,]+e[-+]\d+[).,;:]*")


def breakable(words: str, long: int = _LONG) -> Markup:
    """Text whose long words may break behind a dot, an underscore or a slash; what is copied of it is the text itself.

    Args:
        words: any text; it is escaped.
        long: up to how many characters a word stays whole.

    >>> print(breakable("the largest is in encoder.layer.0.output_dense.weight"))
    the largest is in encoder.<wbr>layer.<wbr>0.<wbr>output_<wbr>dense.<wbr>weight
    >>> print(breakable("3.5e-08; 1 < 2"))
    <span class="whole">3.5e-08;</span> 1 <span class="whole">&lt; 2</span>
    >>> print(breakable("98 % of them"))
    <span class="whole">98 %</span> of them
    """
    return Markup().join(_word(word, long) for word in _SPACE.split(text.visible(words)))


def _word(word: str, long: int) -> Markup:
    if _NUMBER.fullmatch(word) or _TIED.fullmatch(word):
        return Markup('<span class="whole">{}</span>').format(word)
    return Markup("<wbr>").join(map(escape, _PIECES.split(word) if len(word) > long else [word]))
