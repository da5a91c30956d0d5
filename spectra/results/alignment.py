"""`alignment`: what an update does to the directions of W₀, one matrix after another."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from spectra.deltas.at_work import Account, accounted, in_hands
from spectra.deltas.base import BaseWeight
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Form
from spectra.deltas.relatedness import unrelated_note
from spectra.deltas.source import Source
from spectra.engine import accounts
from spectra.engine.costs import dense_flops
from spectra.engine.devices import device_named, resolve_device
from spectra.engine.memory import memory_budget as memory_budget_of
from spectra.engine.memory import readable_size
from spectra.engine.solve import ROUNDING_ONLY, Wanted, out_of_memory, read, solve_forms
from spectra.errors import BaseRequiredError, SelectionError, SpectraError, StoreError, refuse_path_for_source
from spectra.files.far import done, expected
from spectra.metrics.alignment import ALIGNMENT, AgainstBase, Triplets, tie_note
from spectra.results.base_cache import BaseCache, triplets_of_base
from spectra.spectrum import Spectrum, Status

if TYPE_CHECKING:
    import pandas as pd

    from spectra.files.tensors import TensorRef
    from spectra.results.tables import Row

_SHARE_OF_TOPS = 0.55  # of a matrix' time, what all but W₀'s decomposition takes (384 to 1,024 rows)
# What is there at once (measured, 409×6544 to 1660²): copies of a matrix, as W₀, ΔW, W and all of W₀'s vectors, and
# squares of its shorter side, which LAPACK works on.
_COPIES, _SQUARES = 7, 4


def alignment(
    source: Iterable[WeightDelta],
    *,
    k: int = 10,
    epsilon: float = 0.5,
    cache: str | Path | None = None,
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> pd.DataFrame:
    """ΔW against W₀: intruder dimensions, amplification and shares of energy, one row per matrix.

    The columns behind `k` and `r` are those of `ALIGNMENT`, each a function of `spectra.metrics.alignment` with its
    definition and its chance level or control beside it. `k` is what was asked for or the rank of W₀ + ΔW, if that is
    less; `r` is how many directions of ΔW count in `amplification`: the rank of an adapter, k of a full fine-tune. A
    matrix that cannot be done has its status and reason, and no numbers.

    Most of the time goes into the singular vectors of W₀: the deciles and the largest cosines need all of them. So
    they are computed once and kept where `cache` says. `intruders` counts intruder dimensions alone, mostly without.

    Args:
        source: a `Source` that was opened with its base, or deltas that know theirs.
        k: how many top directions of W₀, of W and of a full fine-tune.
        epsilon: the cosine under which a direction of W is an intruder.
        cache: a directory for W₀'s singular vectors, as large as W₀ in float64 twice over; the next run with the
            same base reads them there. None to keep nothing.
        device: as for `decompose`.
        executor: as for `decompose`: matrices side by side, and as many at once as the budget holds.
        memory_budget: as for `decompose`.

    Raises:
        BaseRequiredError: no matrix knows its W₀.
        SelectionError: k is not positive, or epsilon not in (0, 1].
        StoreError: the cache cannot be written to.
    """
    import pandas as pd

    rows = alignment_rows(
        source, k=k, epsilon=epsilon, cache=cache, device=device, executor=executor, memory_budget=memory_budget
    )
    return pd.DataFrame(list(rows))


def alignment_rows(
    source: Iterable[WeightDelta],
    *,
    k: int = 10,
    epsilon: float = 0.5,
    cache: str | Path | None = None,
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> Iterator[Row]:
    """The rows of `alignment` as they are finished, in the source's order; arguments and errors as there."""
    return rows_of(source, Work(k, epsilon, device, cache=BaseCache.at(cache)), executor, memory_budget)


def rows_of(
    source: Iterable[WeightDelta], work: Work, executor: Executor | None, memory_budget: int | str | None
) -> Iterator[Row]:
    """The rows that the work makes of every delta, in their order.

    Raises:
        BaseRequiredError: no matrix knows its W₀.
        SelectionError: k is not positive, or epsilon not in (0, 1].
    """
    refuse_path_for_source(source, work.called)
    if work.k < 1:
        raise SelectionError(f"k = {work.k} is not a positive number of directions")
    if not 0 < work.epsilon <= 1:
        raise SelectionError(f"epsilon = {work.epsilon} is not a cosine between 0 and 1")
    deltas = source.deltas if isinstance(source, Source) else tuple(source)
    if deltas and all(delta.base is None for delta in deltas):
        raise BaseRequiredError(
            f"alignment compares an update with the weights it started from, and {deltas[0].name} has none: "
            "pass base= (--base) when the source is opened"
        )
    account = _account(work, deltas, executor)
    if executor is None:
        work = replace(work, device=resolve_device(work.device), budget=_budget(memory_budget, work.device))
        rows = _one_by_one(work, deltas)
    else:
        budget = memory_budget_of(memory_budget) if memory_budget is not None else _budget_of(executor)
        rows = _side_by_side(executor, replace(work, budget=budget), deltas)
    return accounted(rows, account, lambda row: str(row["name"]))


def _account(work: Work, deltas: Sequence[WeightDelta], executor: Executor | None) -> Account:
    """What each costs: W₀'s decomposition, except where its vectors are kept."""
    return accounts.account_of_all_vectors(
        {delta.name: work.cost(delta) for delta in deltas}, device=work.device, executor=executor
    )


def _one_by_one(work: Work, deltas: Sequence[WeightDelta]) -> Iterator[Row]:
    with expected(map(_read_of, deltas), fetches=len(deltas) > 1):
        for delta in deltas:
            yield work(delta)
            done(_read_of(delta))


def _read_of(delta: WeightDelta) -> Sequence[TensorRef]:
    """What is read of a matrix; nothing where there is no W₀ to compare it with."""
    return delta.refs if delta.base is not None else ()


def _budget(given: int | str | None, device: str) -> int:
    return memory_budget_of(given) if given is not None else device_named(resolve_device(device)).budget()


def _budget_of(executor: Executor) -> int:
    elsewhere: int | None = getattr(executor, "memory_budget", None)
    return elsewhere or device_named("cpu").budget()


def _side_by_side(executor: Executor, work: Work, deltas: Sequence[WeightDelta]) -> Iterator[Row]:
    """The rows in the deltas' order, computed as many at once as there are workers and the budget holds."""
    most = getattr(executor, "_max_workers", None) or 1
    waiting = deque(deltas)
    running: deque[tuple[Future[Row], int]] = deque()
    try:
        while waiting or running:
            while waiting and len(running) < most:
                needed = _bytes_for(waiting[0])
                if running and sum(size for _, size in running) + needed > work.budget:
                    break
                running.append((executor.submit(work, waiting.popleft()), needed))
            yield running[0][0].result()
            running.popleft()
    finally:
        for future, _ in running:
            future.cancel()


def _bytes_for(delta: WeightDelta) -> int:
    return 8 * (_COPIES * math.prod(delta.shape) + _SQUARES * min(delta.shape, default=0) ** 2)


class UndoneError(Exception):
    """A matrix that has no numbers; its spectrum says why."""

    def __init__(self, spectrum: Spectrum) -> None:
        super().__init__(spectrum.reason)
        self.spectrum = spectrum


@dataclass(frozen=True)
class Work:
    """What to do with every delta; travels to executors.

    Attributes:
        k: how many top directions.
        epsilon: the cosine under which one is an intruder.
        device: "auto" for the one of the machine where it runs.
        budget: bytes that the matrices at work may take.
        cache: where W₀'s vectors are kept.
    """

    k: int
    epsilon: float
    device: str
    budget: int = 0
    cache: BaseCache | None = None

    called: ClassVar[str] = "alignment"

    @property
    def columns(self) -> tuple[str, ...]:
        """What `numbers` gives, beside a note."""
        return ("k", "r", *ALIGNMENT)

    def cost(self, delta: WeightDelta) -> float:
        """Operations of the decompositions that it takes; W₀'s is most of them, where its vectors are not kept."""
        if delta.recipe is None or delta.base is None:
            return 0.0
        whole = dense_flops(delta.shape, min(delta.shape, default=0))
        return whole * (_SHARE_OF_TOPS if self.cache and self.cache.holds(delta.base) else 1.0)

    def numbers(self, delta: WeightDelta) -> Row:
        """The columns of a matrix that can be done."""
        seen, said = self._seen(delta)
        sizes = {"k": len(seen.tuned_top.S), "r": len(seen.update_top.S)}
        note = "; ".join(filter(None, (said, tie_note(seen))))
        return sizes | {name: metric(seen) for name, metric in ALIGNMENT.items()} | {"note": note}

    def __call__(self, delta: WeightDelta) -> Row:
        """The row of one matrix; what cannot be done has a status there."""
        with expected([_read_of(delta)]), in_hands("solving", delta.name, delta.shape):
            return self._done(delta)

    def _done(self, delta: WeightDelta) -> Row:
        try:
            return self._row(delta, _outcome(delta, "ok"), self.numbers(delta))
        except UndoneError as problem:
            return self._row(delta, problem.spectrum)
        except StoreError:  # of the cache, which concerns all of them
            raise
        except SpectraError as problem:
            return self._row(delta, _outcome(delta, "unreadable", str(problem)))
        except (MemoryError, RuntimeError) as problem:
            said = (str(problem) or type(problem).__name__).splitlines()[0]
            return self._row(delta, _outcome(delta, "too_large" if out_of_memory(problem) else "failed", said))

    def read(self, delta: WeightDelta) -> tuple[Form, Tensor, BaseWeight]:
        """ΔW, W₀, and where W₀ is.

        Raises:
            UndoneError: there is nothing to read, or no room for it.
        """
        if delta.recipe is None:
            raise UndoneError(_outcome(delta, delta.status, delta.reason))
        if delta.base is None:
            raise UndoneError(_outcome(delta, "unsupported", "the base has no such weight to compare it with"))
        needed = _bytes_for(delta)
        if needed > self.budget:
            told = f"needs {readable_size(needed)}, the budget is {readable_size(self.budget)}"
            raise UndoneError(_outcome(delta, "too_large", f"{told}; raise memory_budget= (--memory)"))
        device = resolve_device(self.device)
        form = read(delta, device)
        if isinstance(form, Spectrum):
            raise UndoneError(form)
        return form, delta.base.read(device), delta.base

    def _seen(self, delta: WeightDelta) -> tuple[AgainstBase, str]:
        """All that the metrics need of one matrix, and what is said of its update."""
        form, weight, where = self.read(delta)
        count = form.max_rank if delta.factored else self.k
        update = self.solved(delta, form, count)
        update_top = self._kept(update, count)
        if not len(update_top.S):
            raise UndoneError(_outcome(delta, "unchanged", "ΔW = 0"))
        base = triplets_of_base(where, weight, self.cache)
        tuned_top = self.top(delta, Dense(weight + form.to_dense()), self.k)
        return AgainstBase(base, form, update_top, tuned_top, self.k, self.epsilon), self.said(form, update)

    def said(self, form: Form, update: Spectrum | None) -> str:
        """That an update is unrelated to W₀, or nothing but rounding as far as its spectrum tells."""
        rounding = ROUNDING_ONLY if update is not None and ROUNDING_ONLY in update.note else ""
        return "; ".join(filter(None, (unrelated_note(form.base_cosine, form.unchanged), rounding)))

    def top(self, delta: WeightDelta, form: Form, k: int) -> Triplets:
        """The top k triplets of a form that are more than rounding, by the engine with its checks; none of 0."""
        return self._kept(self.solved(delta, form, k), k)

    def solved(self, delta: WeightDelta, form: Form, k: int) -> Spectrum:
        """The top k of a form, by the engine with its checks."""
        wanted = Wanted(k, only_top=True, device=device_named(resolve_device(self.device)))
        (spectrum,) = solve_forms([delta], [form], wanted)
        return spectrum

    def _kept(self, spectrum: Spectrum, k: int) -> Triplets:
        device = resolve_device(self.device)
        if spectrum.status == "unchanged":
            m, n = spectrum.shape
            return Triplets(*(torch.zeros(size, dtype=torch.float64) for size in ((m, 0), 0, (0, n))))
        if spectrum.status != "ok" or spectrum.U is None or spectrum.Vh is None:
            raise UndoneError(spectrum)
        kept = min(spectrum.rank, k, spectrum.k)
        arrays = (spectrum.U[:, :kept], spectrum.S[:kept], spectrum.Vh[:kept])
        return Triplets(*(torch.as_tensor(array, device=device) for array in arrays))

    def _row(self, delta: WeightDelta, outcome: Spectrum, numbers: Row | None = None) -> Row:
        """One matrix as column → value; None for every number of a matrix that has none."""
        out, inside = delta.shape if len(delta.shape) == 2 else (None, None)
        return {
            "name": delta.name,
            "role": delta.role,
            "layer": delta.layer,
            "out": out,
            "in": inside,
            "status": outcome.status,
            **{name: None if numbers is None else numbers[name] for name in self.columns},
            "reason": outcome.reason,
            "note": "; ".join(filter(None, (delta.note, (numbers or {}).get("note")))),
        }


COLUMNS = ("name", "role", "layer", "out", "in", "status", "k", "r", *ALIGNMENT, "reason", "note")


def _outcome(delta: WeightDelta, status: Status, reason: str = "") -> Spectrum:
    return Spectrum(delta.name, delta.shape, status, reason=reason, max_rank=delta.max_rank)
