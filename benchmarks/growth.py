"""How our time grows with size, rank and number of matrices."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import spectra
from benchmarks import inputs
from benchmarks.measure import timed
from spectra import WeightDelta

Point = dict[str, str | int | float]


def points(repeats: int) -> Iterator[Point]:
    """One point per size, rank and number."""
    for size in (128, 256, 512, 1024, 2048):
        dense = WeightDelta.from_tensor("a", inputs.gaussian(size, size))
        yield _point("size, values", size, [dense], None, repeats)
        yield _point("size, values + top 30", size, [dense], 30, repeats)
    for rank in (8, 16, 32, 64, 128, 256, 512):
        delta = WeightDelta.from_factors("a", *inputs.factors(4096, rank, 4096))
        yield _point("rank of factors on 4096², values + top 8", rank, [delta], 8, repeats)
    for count in (1, 2, 4, 8, 16):
        deltas = [WeightDelta.from_tensor(str(i), inputs.gaussian(768, 768, i)) for i in range(count)]
        yield _point("number of 768² matrices, values", count, deltas, None, repeats)


def _point(what: str, x: int, deltas: list[WeightDelta], top: int | None, repeats: int) -> Point:
    way = timed(lambda: list(spectra.decompose(deltas, top=top)))
    return {"what": what, "x": x, "seconds": statistics.median(way().seconds for _ in range(repeats))}
