"""Metrics that are stored with a spectrum, so that the table of thousands does not measure all of them again.

They count as long as the code that made them is the same, byte for byte.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import spectra.metrics
import spectra.spectrum
from spectra.metrics import METRICS
from spectra.results import tables
from spectra.spectrum import Spectrum


def record_of(spectrum: Spectrum) -> dict[str, Any]:
    """The metrics in the order of METRICS, and what code they are of."""
    row = tables.row(spectrum)
    values = [row[name] for name in METRICS]
    if any(math.isinf(value) for value in values):  # JSON has none
        return {}
    return {"measured": values, "measured_by": code()}


def remember(spectrum: Spectrum, record: dict[str, Any]) -> None:
    """Keep the metrics of a record for the row of the spectrum that was stored with it, if the code is the same."""
    if record.get("measured_by") != code():
        return
    values = record.get("measured")
    if isinstance(values, list) and len(values) == len(METRICS) and set(map(type, values)) <= {float, type(None)}:
        known = [math.nan if value is None else value for value in values]
        tables.remember(spectrum, dict(zip(METRICS, known, strict=True)))


@cache
def code() -> str:
    """BLAKE2b of the source of everything that a metric is made of; "" where there is none, which counts as none."""
    metrics = Path(spectra.metrics.__file__).parent
    files = [Path(spectra.spectrum.__file__), *sorted(metrics.glob("*.py"))]
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
