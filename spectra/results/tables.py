"""Spectra × metrics → tables: rows of plain values, and a tidy DataFrame."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from spectra.errors import TruncatedSpectrumError
from spectra.metrics import METRICS
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.spectrum import DONE, Spectrum

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]


def row(spectrum: Spectrum, metrics: Mapping[str, Callable[[Spectrum], float]] = METRICS) -> Row:
    """One matrix as column → value; NaN where a metric has no value or would need values that are not there."""
    out, inside = spectrum.shape if len(spectrum.shape) == 2 else (None, None)
    found: Row = {
        "name": spectrum.name,
        "role": spectrum.role,
        "layer": spectrum.layer,
        "out": out,
        "in": inside,
        "status": spectrum.status,
        "max_rank": spectrum.max_rank,
        "rank": spectrum.rank if spectrum.status in DONE else None,
        "signal_rank": spectrum.signal_rank if spectrum.status in DONE else None,
        "noise_edge": spectrum.noise_edge,
        "unchanged": spectrum.unchanged,
        "k": spectrum.k,
    }
    for name, metric in metrics.items():
        found[name] = _value(metric, spectrum)
    return found | {"method": spectrum.method, "reason": spectrum.reason, "note": spectrum.note}


def _value(metric: Callable[[Spectrum], float], spectrum: Spectrum) -> float:
    if spectrum.status not in DONE:
        return math.nan
    try:
        return metric(spectrum)
    except TruncatedSpectrumError:
        return math.nan


def similarity_row(similarity: SubspaceSimilarity) -> Row:
    """One comparison as column → value."""
    k = similarity.k_used
    return {
        "name": similarity.name,
        "role": similarity.role,
        "side": similarity.side,
        "k_used": k,
        "phi": similarity.phi,
        "chance": float(similarity.chance[-1, -1]),
        "phi_1_1": float(similarity.grid[0, 0]),
        "smallest_angle": float(similarity.angles[0]),
        "largest_angle": float(similarity.angles[-1]),
        "gap": similarity.gap,
        "note": similarity.note,
    }


def summarize(spectra: Iterable[Spectrum]) -> pd.DataFrame:
    """One row per matrix: names, shape, status, ranks and every metric of METRICS.

    Example:
        >>> table = summarize([Spectrum("layers.0.v_proj.weight", (2, 2), S=[4.0, 3.0])])
        >>> print(table[["role", "norm", "max_rank"]].to_string(index=False))
          role  norm  max_rank
        v_proj   5.0         2
    """
    import pandas as pd

    return pd.DataFrame([row(spectrum) for spectrum in spectra])


def to_csv(rows: list[Row]) -> str:
    """Rows as CSV text; empty cells for None and NaN."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _blank(value) for key, value in line.items()} for line in rows)
    return buffer.getvalue()


def _blank(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def strict(value: Any) -> Any:
    """The value with NaN and infinities as None, so that it makes strict JSON.

    >>> strict({"a": [1.5, float("nan")]})
    {'a': [1.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "tolist"):
        return strict(value.tolist())
    return value
