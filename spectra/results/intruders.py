"""`intruders`: intruder dimensions alone, counted exactly without all of W₀'s vectors where a proof does without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from spectra.deltas.base import BaseWeight
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Form
from spectra.metrics import alignment as metrics
from spectra.metrics.alignment import AgainstBase, Triplets, largest_cosines
from spectra.metrics.nearness import nearness
from spectra.results.alignment import UndoneError, Work, rows_of
from spectra.results.base_cache import BaseCache, triplets_of_base
from spectra.spectrum import Spectrum

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from spectra.results.tables import Row

_COLUMNS = ("k", "intruders", "decided_by", "least_cosines", "most_cosines")
COLUMNS = ("name", "role", "layer", "out", "in", "status", *_COLUMNS, "reason", "note")
BY_BOUNDS = "bounds"
BY_VECTORS = "all vectors of W₀"
_ROUNDING = 2  # times what rounding leaves of energy: of more, something is above its edge for certain
_TOP = 2  # times k: triplets of W₀ that are computed; W's top directions are mostly among these


def intruders(
    source: Iterable[WeightDelta],
    *,
    k: int = 10,
    epsilon: float = 0.5,
    cache: str | Path | None = None,
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> pd.DataFrame:
    """Intruder dimensions of every matrix: the count that `alignment` gives, mostly without the SVD of W₀.

    A direction of W that is near one of W₀'s top 2k is none. That no other vector of W₀ comes near one is proven by
    bounds from a few products with W₀ (`spectra.metrics.nearness`). Where the bounds leave a direction open, as for a
    cosine close to ε, all vectors of W₀ are computed after all, and `decided_by` says so.

    `least_cosines` and `most_cosines` are what the largest cosine of each direction lies between.

    Args:
        source: a `Source` that was opened with its base, or deltas that know theirs.
        k: how many top left vectors of W.
        epsilon: the cosine under which a direction is an intruder.
        cache: as for `alignment`, whose directory is read and written where all vectors are needed.
        device: as for `decompose`.
        executor: as for `decompose`.
        memory_budget: as for `decompose`.

    Raises:
        BaseRequiredError: no matrix knows its W₀.
        SelectionError: k is not positive, or epsilon not in (0, 1].
        StoreError: the cache cannot be written to.

    Reference: Shuttleworth et al. 2024, Alg. 1.
    """
    import pandas as pd

    rows = intruder_rows(
        source, k=k, epsilon=epsilon, cache=cache, device=device, executor=executor, memory_budget=memory_budget
    )
    return pd.DataFrame(list(rows))


def intruder_rows(
    source: Iterable[WeightDelta],
    *,
    k: int = 10,
    epsilon: float = 0.5,
    cache: str | Path | None = None,
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> Iterator[Row]:
    """The rows of `intruders` as they are finished, in the source's order; arguments and errors as there."""
    return rows_of(source, _Counting(k, epsilon, device, cache=BaseCache.at(cache)), executor, memory_budget)


@dataclass(frozen=True)
class _Counting(Work):
    """Counts the intruders of every delta."""

    called: ClassVar[str] = "intruders"

    @property
    def columns(self) -> tuple[str, ...]:
        """What `numbers` gives."""
        return _COLUMNS

    def numbers(self, delta: WeightDelta) -> Row:
        """The count, what it rests on, and the bounds."""
        form, weight, where = self.read(delta)
        if form.is_zero:
            raise UndoneError(Spectrum(delta.name, delta.shape, "unchanged", reason="ΔW = 0"))
        counted = self._counted(delta, form, weight, where)
        update = self.solved(delta, form, 1) if _as_small_as_rounding(form) else None
        return counted | {"note": self.said(form, update)}

    def _counted(self, delta: WeightDelta, form: Form, weight: Tensor, where: BaseWeight) -> Row:
        tuned = self.top(delta, Dense(weight + form.to_dense()), self.k)
        if self.cache is None or self.cache.get(where) is None:
            top = self.top(delta, Dense(weight), min(_TOP * self.k, *weight.shape))
            near = nearness(weight, top, tuned.U, epsilon=self.epsilon)
            count = near.intruders(self.epsilon)
            if count is not None:
                return self._told(tuned, count, BY_BOUNDS, near.least.tolist(), near.most.tolist())
        seen = AgainstBase(triplets_of_base(where, weight, self.cache), form, tuned, tuned, self.k, self.epsilon)
        cosines = largest_cosines(seen)
        return self._told(tuned, metrics.intruders(seen), BY_VECTORS, cosines, cosines)

    def _told(self, tuned: Triplets, count: int, by: str, least: list[float], most: list[float]) -> Row:
        return dict(zip(self.columns, (len(tuned.S), count, by, least, most), strict=True))


def _as_small_as_rounding(form: Form) -> bool:
    """Whether an update may be nothing but rounding, by its energy: most are not, and are spared their own SVD."""
    return any(noise.known and form.norm**2 <= _ROUNDING * noise.energy for noise in form.noise)
