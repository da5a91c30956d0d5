"""`interference`: what several updates of one base do to each other when they are added, matrix by matrix."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spectra import naming
from spectra.deltas.at_work import accounted
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense
from spectra.deltas.relatedness import unrelated_note
from spectra.deltas.source import Source
from spectra.engine.accounts import account_of_all_vectors
from spectra.engine.costs import flops
from spectra.engine.devices import device_named, resolve_device
from spectra.engine.solve import Wanted, solve, solve_forms
from spectra.errors import SelectionError, refuse_path_for_source
from spectra.files.far import done, expected
from spectra.files.tensors import TensorRef
from spectra.metrics.alignment import Triplets
from spectra.metrics.interference import INTERFERENCE, Together, sum_of
from spectra.metrics.sides import Beside
from spectra.spectrum import DONE, Spectrum, times_power

if TYPE_CHECKING:
    import pandas as pd

    from spectra.results.tables import Row

_LARGEST, _SMALLEST = 1e70, 1e-70  # of σ, whose squares, and products of those, are in range between
_OF_SUM = 3  # decompositions of one update take as long as the sum's, with the numbers that are made of it
ALONE = "alone"  # the status of a matrix that only one update has
COLUMNS = ("name", "role", "layer", "status", "updates", *INTERFERENCE, "reason", "note")


def interference(
    sources: Sequence[Iterable[WeightDelta]], *, device: str = "auto", executor: Executor | None = None
) -> pd.DataFrame:
    """Several updates of one base, one row per matrix: cosines, what the sum keeps, STI, SAR, and what they share.

    The columns behind `updates` are those of `INTERFERENCE`, each a function of `spectra.metrics.interference` with
    its definition. Factored updates are never multiplied out, and one matrix at a time is in memory.

    A matrix that only some updates have is measured over those: `updates` says which (counted from 1), the note names
    the others, and in `cosines`, `norms`, `sar` and `shared_kept`, which always have a place for each update, theirs is
    NaN. A matrix that only one has is a row of status "alone" without numbers.

    Args:
        sources: at least two sources, or any deltas, of the same base.
        device: as for `decompose`.
        executor: where to run, such as a `ThreadPoolExecutor`; None for one matrix after another in this process.

    Raises:
        SelectionError: fewer than two sources, or no matrix is in two of them.

    Example:
        >>> one = WeightDelta.from_tensor("w", torch.diag(torch.tensor([3.0, 4.0])))
        >>> other = WeightDelta.from_tensor("w", torch.diag(torch.tensor([-3.0, -4.0])))
        >>> row = interference([[one], [other]]).iloc[0]
        >>> [[round(cosine, 12) for cosine in line] for line in row["cosines"]], float(row["norm_ratio"]), row["sar"]
        ([[1.0, -1.0], [-1.0, 1.0]], 0.0, [nan, nan])
    """
    import pandas as pd

    return pd.DataFrame(list(interference_rows(sources, device=device, executor=executor)))


def interference_rows(
    sources: Sequence[Iterable[WeightDelta]], *, device: str = "auto", executor: Executor | None = None
) -> Iterator[Row]:
    """The rows of `interference` as they are finished, in the sources' order; arguments and errors as there."""
    if isinstance(sources, Source):
        raise SelectionError("interference is between updates, and 1 was given: give a list of two or more")
    refuse_path_for_source(sources, "interference")
    for source in sources:
        refuse_path_for_source(source, "interference")
    updates = [{delta.name: delta for delta in source} for source in sources]
    if len(updates) < 2:
        raise SelectionError(f"interference is between updates, and {len(updates)} was given: give two or more")
    names = list(dict.fromkeys(name for update in updates for name in update))
    if not any(sum(name in update for update in updates) > 1 for name in names):
        examples = ", ".join(repr(next(iter(update), "nothing")) for update in updates)
        raise SelectionError(f"no matrix is in two of the updates (they have {examples}): give updates of one base")
    where = resolve_device(device)
    of_each = [
        (name, {place: update[name] for place, update in enumerate(updates) if name in update}) for name in names
    ]
    together = {name: list(there.values()) for name, there in of_each if len(there) > 1}
    costs = {name: _cost(deltas) for name, deltas in together.items()}
    account = account_of_all_vectors(costs, device=device, executor=executor)
    if executor is None:
        rows = _one_by_one(of_each, len(updates), where)
    else:
        rows = _ahead(executor, of_each, len(updates), where)
    return accounted(rows, account, lambda row: str(row["name"]))


def _cost(deltas: Sequence[WeightDelta]) -> float:
    """Operations of the updates' decompositions, and of the sum's and what is made of it."""
    each = [flops(delta, delta.max_rank) for delta in deltas]
    return sum(each) + _OF_SUM * max(each)


def _one_by_one(of_each: Sequence[tuple[str, Mapping[int, WeightDelta]]], count: int, device: str) -> Iterator[Row]:
    together = [refs for _, there in of_each if (refs := _read_of(there))]
    with expected(together, fetches=len(together) > 1):
        for name, there in of_each:
            yield _row(name, there, count, device)
            done(_read_of(there))


def _read_of(there: Mapping[int, WeightDelta]) -> list[TensorRef]:
    """What is read of a matrix that several updates have; nothing of one that has nothing to be measured with."""
    return [ref for delta in there.values() for ref in delta.refs] if len(there) > 1 else []


def _ahead(
    executor: Executor, of_each: Iterable[tuple[str, Mapping[int, WeightDelta]]], count: int, device: str
) -> Iterator[Row]:
    """The rows in order, as many matrices at work as the executor has workers."""
    waiting: deque[Future[Row]] = deque()
    try:
        for name, there in of_each:
            waiting.append(executor.submit(_row, name, there, count, device))
            if len(waiting) > getattr(executor, "_max_workers", 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _row(name: str, there: Mapping[int, WeightDelta], count: int, device: str) -> Row:
    """One matrix over the updates that have it, by their places among `count`."""
    with expected([_read_of(there)]):
        return _done(name, there, count, device)


def _done(name: str, there: Mapping[int, WeightDelta], count: int, device: str) -> Row:
    missing = [str(place + 1) for place in range(count) if place not in there]
    note = f"not in update {', '.join(missing)}" if missing else ""
    if len(there) == 1:
        return _line(name, there, ALONE, f"only in update {next(iter(there)) + 1} of {count}")
    shapes = {delta.shape for delta in there.values() if delta.recipe is not None}
    if len(shapes) > 1:
        return _line(name, there, "shape_mismatch", f"the updates have shapes {sorted(shapes)}", note)
    found: list[Tensor] = []
    most = sum(max(1, delta.max_rank) for delta in there.values())
    lefts, rights = Beside(most), Beside(most)
    for place, delta in there.items():
        spectrum = solve(delta, top=max(1, delta.max_rank), only_top=True, device=device)
        if spectrum.status not in DONE:
            return _line(name, there, spectrum.status, f"update {place + 1}: {spectrum.reason}", note)
        said = unrelated_note(spectrum.base_cosine, spectrum.unmoved_share)
        note = note if said in note else "; ".join(filter(None, (note, said)))
        triplets = _triplets(spectrum, device)
        found.append(triplets.S)
        lefts.add(triplets.U)
        rights.add(triplets.Vh.mT)
        del spectrum, triplets  # else they are there beside the next
    values, exponent = _brought_near(found)
    left, right = lefts.side(), rights.side()
    total = _sum(name, sum_of(values, left, right), device)
    if total.status not in DONE:
        return _line(name, there, total.status, f"the sum of the updates: {total.reason}", note)
    seen = Together(values, left, right, _triplets(total, device))
    numbers: Row = {column: metric(seen) for column, metric in INTERFERENCE.items()}
    numbers["norms"] = [times_power(norm, exponent) for norm in numbers["norms"]]
    numbers["sti_raw"] = times_power(numbers["sti_raw"], exponent)
    return _line(name, there, "ok", "", note) | _in_their_places(numbers, list(there), count)


def _brought_near(values: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """The updates' values divided by 2^e, if their squares leave float64's range; and e.

    The numbers are of what the updates are to one another, the norms and `sti_raw` aside.
    """
    largest = max((float(own[0]) for own in values if len(own)), default=0.0)
    if not largest or _SMALLEST < largest < _LARGEST:
        return tuple(values), 0
    exponent = math.frexp(largest)[1]
    half = -exponent // 2
    factors = 2.0**half, 2.0 ** (-exponent - half)
    return tuple(own * factors[0] * factors[1] for own in values), exponent


def _line(name: str, there: Iterable[int], status: str, reason: str, note: str = "") -> Row:
    return {
        "name": name,
        "role": naming.role_of(name),
        "layer": naming.layer_of(name),
        "status": status,
        "updates": [place + 1 for place in there],
        **dict.fromkeys(INTERFERENCE),
        "reason": reason,
        "note": note,
    }


def _triplets(spectrum: Spectrum, device: str) -> Triplets:
    """What is more than rounding; nothing of an update that is zero."""
    m, n = spectrum.shape
    U, Vh = spectrum.U, spectrum.Vh
    if U is None or Vh is None:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return Triplets(empty.expand(m, 0), empty, empty[:, None].expand(0, n))
    kept = min(spectrum.rank, spectrum.k)
    return Triplets(*(torch.as_tensor(part, device=device) for part in (U[:, :kept], spectrum.S[:kept], Vh[:kept])))


def _sum(name: str, total: Tensor, device: str) -> Spectrum:
    """The spectrum of ΣΔ with all vectors; unchanged where the updates cancel."""
    form = Dense(total)
    blank = WeightDelta(name, form.shape, None, form.max_rank)
    wanted = Wanted(form.max_rank, only_top=True, device=device_named(device))
    (spectrum,) = solve_forms([blank], [form], wanted)
    return spectrum


def _in_their_places(numbers: Row, places: Sequence[int], count: int) -> Row:
    """Lists that have an entry per update, with NaN for the updates without this matrix."""
    if len(places) == count:
        return numbers
    at = {place: i for i, place in enumerate(places)}

    def spread(values: Sequence[float]) -> list[float]:
        return [values[at[place]] if place in at else math.nan for place in range(count)]

    nothing = [math.nan] * count
    square = numbers["cosines"]
    cosines = [spread(square[at[place]]) if place in at else nothing for place in range(count)]
    return numbers | {"cosines": cosines} | {key: spread(numbers[key]) for key in ("norms", "sar", "shared_kept")}
