"""How text that comes from files is printed: names are their author's, and what they do to a terminal is not.

Escape sequences recolour, retitle and overwrite; bidirectional controls reorder what people read; half a surrogate pair
cannot be written at all.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, format and bidi, surrogates, line and paragraph ends


def printed(text: object) -> str:
    """A text as it is shown: control, bidirectional and surrogate characters as escapes, everything else as it is.

    Example:
        >>> printed("q_proj.weight"), printed("\\x1b[31mred\\x07"), printed(chr(0x202E) + chr(0xD800))
        ('q_proj.weight', '\\\\x1b[31mred\\\\x07', '\\\\u202e\\\\ud800')
    """
    whole = str(text)
    if whole.isascii() and whole.isprintable():
        return whole
    return "".join(_escape(sign) if unicodedata.category(sign) in _ESCAPED else sign for sign in whole)


def printed_lines(text: object) -> str:
    """As `printed`, of a text of several lines, which stay lines."""
    return "\n".join(map(printed, str(text).split("\n")))


def printed_json(text: str) -> str:
    """A JSON document with the same characters as JSON's own escapes: it says the same and does nothing to a terminal.

    >>> printed_json('{"name": "' + chr(0x9B) + chr(0x202E) + '"}')
    '{"name": "\\\\u009b\\\\u202e"}'
    """
    if text.isascii():  # json escapes what is below a space itself, all but the line ends between its entries
        return text.replace("\x7f", "\\u007f")
    return "".join(_in_json(sign) if unicodedata.category(sign) in _ESCAPED else sign for sign in text)


def in_figure(text: object) -> str:
    """As `printed`, for matplotlib, which takes what stands between two dollar signs for mathematics.

    Nor does it put a curve into a legend whose name begins with an underscore.

    >>> in_figure("a$b$"), in_figure("_hidden")
    ('a\\\\$b\\\\$', ' _hidden')
    """
    shown = printed_lines(text).replace("\\$", "$").replace("$", "\\$")
    return f" {shown}" if shown.startswith("_") else shown


def shortened(text: str, width: int) -> str:
    """A text within a width, its middle left out.

    >>> shortened("model.layers.10.self_attn.v_proj.weight", 20)
    'model.laye…oj.weight'
    """
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def _in_json(sign: str) -> str:
    if sign == "\n":  # never within a string
        return sign
    units = sign.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def strict(value: Any) -> Any:
    """The value with NaN and infinities as None, so that it makes strict JSON.

    >>> strict({"a": [1.5, float("nan")]})
    {'a': [1.5, None]}
    """
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else None
    if value is None or kind in (str, int, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "tolist"):
        return strict(value.tolist())
    return value
