"""Many updates of one shape at once on a device, the next batch read while this one computes.

The same code runs on any torch device; the tests run it on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from spectra.engine import dense, factored, kronecker
from spectra.engine.ladder import Numbers, batched, solvers
from spectra.engine.plan import Batch
from spectra.engine.solve import (
    accepted,
    after_failure,
    blank_for,
    climb,
    examine,
    fault,
    out_of_memory,
    with_status,
)
from spectra.errors import SpectraError
from spectra.types import Dense, Form, Kronecker, LowRank, Spectrum, WeightDelta

Read = list[Form | Spectrum]  # a form, or the result if there is none to solve


def decompose_batches(
    deltas: Sequence[WeightDelta], batches: Sequence[Batch], *, top: int, only_top: bool, device: str
) -> Iterator[tuple[int, Spectrum]]:
    """The spectra of all batches, each with its delta's position.

    Args:
        deltas: all deltas.
        batches: what to solve together, in order.
        top: how many vectors; 0 for none.
        only_top: keep the top values alone.
        device: where to compute.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="spectra-read") as reader:
        coming: Future[Read] | None = None
        for place, batch in enumerate(batches):
            members = [deltas[task.index] for task in batch.tasks]
            forms = coming.result() if coming else read_batch(members, device)
            following = batches[place + 1] if place + 1 < len(batches) else None
            coming = (
                reader.submit(read_batch, [deltas[task.index] for task in following.tasks], device)
                if following
                else None
            )
            spectra = solve_batch(members, forms, top=top, only_top=only_top, device=device)
            yield from zip([task.index for task in batch.tasks], spectra, strict=True)


def read_batch(members: Sequence[WeightDelta], device: str) -> Read:
    """The forms of deltas on the device; a result with a status for those that cannot be read."""
    found: Read = []
    for delta in members:
        blank = blank_for(delta)
        if delta.recipe is None:
            found.append(blank)
            continue
        try:
            found.append(delta.read(device))
        except SpectraError as problem:
            found.append(with_status(blank, "unreadable", str(problem)))
        except (MemoryError, RuntimeError) as problem:
            found.append(after_failure(blank, problem, device))
    return found


def solve_batch(
    members: Sequence[WeightDelta], forms: Read, *, top: int, only_top: bool, device: str
) -> list[Spectrum]:
    """The spectra of updates of equal shape; one that fails its check climbs its own ladder from there."""
    results: list[Spectrum | None] = []
    known = []
    for delta, form in zip(members, forms, strict=True):
        settled, facts = (form, {}) if isinstance(form, Spectrum) else examine(blank_for(delta), form)
        results.append(settled)
        known.append(facts)
    open_ = [i for i, settled in enumerate(results) if settled is None]
    ready = {i: form for i in open_ if not isinstance(form := forms[i], Spectrum)}
    numbers, history = _halving(list(ready.values()), top)
    for (i, form), found in zip(ready.items(), numbers, strict=True):
        blank = blank_for(members[i])
        results[i] = _finish(blank, form, found, top, only_top, known[i], history, device)
    return [result for result in results if result is not None]


def _finish(
    blank: Spectrum,
    form: Form,
    numbers: Numbers | str,
    top: int,
    only_top: bool,
    known: dict,
    history: str,
    device: str,
) -> Spectrum:
    rung = batched(form, top)
    tried = [history] if history else []
    why = f"gave up ({numbers})" if isinstance(numbers, str) else ""
    if not isinstance(numbers, str):
        problem = fault(form, rung, numbers, known)
        if not problem:
            return accepted(blank, rung, numbers, top, only_top, known, tried)
        why = f"rejected ({problem})"
    rest = [solver for solver in solvers(form, top, only_top) if solver.rung != rung]
    try:
        return climb(blank, form, rest, top, only_top, known, "; then ".join([*tried, f"{rung.name} {why}"]))
    except (MemoryError, RuntimeError) as failure:
        return after_failure(blank, failure, device)


def _halving(forms: list[Form], top: int) -> tuple[list[Numbers | str], str]:
    """Numbers per form, or why there are none; a batch that memory is too small for is halved, and that is said."""
    if not forms:
        return [], ""
    try:
        return list(_numbers(forms, top)), ""
    except (MemoryError, RuntimeError) as problem:
        said = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        if not out_of_memory(problem) or len(forms) == 1:
            return [said] * len(forms) if len(forms) == 1 else [_alone(form, top) for form in forms], ""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(forms) + 1) // 2
    first, second = _halving(forms[:half], top), _halving(forms[half:], top)
    return [*first[0], *second[0]], f"batch of {len(forms)} halved for want of memory"


def _alone(form: Form, top: int) -> Numbers | str:
    return _halving([form], top)[0][0]


def _numbers(forms: list[Form], top: int) -> Iterator[Numbers]:
    """One batched solve."""
    found: tuple[Tensor, Tensor | None, Tensor | None]
    if isinstance(forms[0], Kronecker):  # two small decompositions each: nothing to gain from a batch
        yield from (kronecker.kronecker_svd(f.first, f.second, top) for f in forms if isinstance(f, Kronecker))
        return
    if isinstance(forms[0], LowRank):
        pairs = [form for form in forms if isinstance(form, LowRank)]
        found = factored.factored_svd(torch.stack([p.left for p in pairs]), torch.stack([p.right for p in pairs]), top)
    else:
        stacked = torch.stack([form.matrix for form in forms if isinstance(form, Dense)])
        found = dense.gram_top(stacked, top) if top else (dense.gram_values(stacked), None, None)
    S, U, Vh = found
    for i in range(len(forms)):
        yield S[i], None if U is None else U[i], None if Vh is None else Vh[i]
