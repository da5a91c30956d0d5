"""Whether the two sides of a full-checkpoint pair belong together, from results and, for one matrix, from W itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from spectra.deltas.relatedness import is_unrelated, rearranged, unrelated_warning
from spectra.deltas.source import Source
from spectra.errors import SourceError

_HEAD_WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
_LARGEST = 2**26  # entries of a weight that is looked at once more for a cause


def unrelated(source: Source, rows: Iterable[Mapping[str, Any]]) -> str:
    """The warning about weights that have nothing to do with the base's; "" where there are none.

    The first of them is read once more: whether it is the base's transposed, with its rows in another order
    or with the sign flipped is then said instead of what it usually is.

    Args:
        source: what was decomposed.
        rows: the rows of its table.

    Reference: `spectra.deltas.relatedness` has the threshold and what it was measured on.
    """
    if source.kind != "checkpoint":
        return ""
    rows = list(rows)
    cosines = {row["name"]: row["base_cosine"] for row in rows if is_unrelated(row["base_cosine"])}
    return unrelated_warning(cosines, len(rows), _cause(source, next(iter(cosines))) if cosines else "")


def _cause(source: Source, name: str) -> str:
    delta = source[name]
    out, inside = delta.shape
    if delta.base is None or out * inside > _LARGEST:
        return ""
    try:
        base = delta.base.read()
        tuned = delta.read().to_dense() + base
    except SourceError:
        return ""
    return rearranged(tuned, base, [out // width for width in _HEAD_WIDTHS if out % width == 0])
