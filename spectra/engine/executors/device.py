"""Many updates of one shape at once on a device, the next batch read while this one computes.

The same code runs on any torch device; the tests run it on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Event

import torch
from torch import Tensor

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Form, Kronecker, LowRank
from spectra.engine.ladder import CHOLESKY_CORE, Numbers, batched, solvers
from spectra.engine.schedule import Batch, slow_double
from spectra.engine.solve import (
    accepted,
    after_failure,
    blank_for,
    climb,
    examine,
    fault,
    out_of_memory,
    tensors_of,
    with_status,
)
from spectra.engine.solvers import dense, factored, kronecker
from spectra.errors import SpectraError
from spectra.spectrum import Spectrum

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
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)  # what the caller has put there is there for the reader's stream, too
    remark = _remark(device)
    stop = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="spectra-read") as reader:
        try:
            coming: Future[Read] | None = None
            for place, batch in enumerate(batches):
                members = [deltas[task.index] for task in batch.tasks]
                forms = (coming or reader.submit(read_batch, members, device, stop)).result()
                following = batches[place + 1] if place + 1 < len(batches) else None
                coming = None
                if following and following.ahead:
                    coming = reader.submit(read_batch, [deltas[task.index] for task in following.tasks], device, stop)
                _hand_over(forms, device)
                spectra = solve_batch(members, forms, top=top, only_top=only_top, device=device)
                del forms  # not kept while the results are stored and the batch after the next is read
                yield from zip([task.index for task in batch.tasks], (_noted(s, remark) for s in spectra), strict=True)
        finally:
            stop.set()  # a run that is given up waits for the matrix that is being read, not for its batch


def read_batch(members: Sequence[WeightDelta], device: str, stop: Event | None = None) -> Read:
    """The forms of deltas on the device; a result with a status for those that cannot be read.

    On a CUDA device everything is copied and formed on a stream of this thread's own, so that it goes on while
    another thread computes; when this returns, it is done.

    Args:
        members: the deltas.
        device: where their forms go.
        stop: once set, no further delta is read.
    """
    found: Read = []
    with _own_stream(device) as finish:
        for delta in members:
            if stop is not None and stop.is_set():
                break
            found.append(_read(delta, device, finish))
    return found


def _read(delta: WeightDelta, device: str, finish: Callable[[], None]) -> Form | Spectrum:
    blank = blank_for(delta)
    if delta.recipe is None:
        return blank
    try:
        form = delta.read(device)
        finish()
        return form
    except SpectraError as problem:
        return with_status(blank, "unreadable", str(problem))
    except (MemoryError, RuntimeError) as problem:
        return after_failure(blank, problem, device)


@contextmanager
def _own_stream(device: str) -> Iterator[Callable[[], None]]:
    """Run what follows on a stream of its own, where the device has streams; gives what waits for it to be done."""
    if not device.startswith("cuda"):
        yield lambda: None
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield stream.synchronize


def _hand_over(forms: Read, device: str) -> None:
    """Tell the allocator that this thread's stream uses what was allocated on the reader's."""
    if device.startswith("cuda"):
        stream = torch.cuda.current_stream(device)
        for form in forms:
            for tensor in () if isinstance(form, Spectrum) else tensors_of(form):
                tensor.record_stream(stream)


def _remark(device: str) -> str:
    """What every result from this device has to say of it."""
    return slow_double(*torch.cuda.get_device_capability(device)) if device.startswith("cuda") else ""


def _noted(spectrum: Spectrum, remark: str) -> Spectrum:
    return replace(spectrum, method=f"{spectrum.method}; {remark}") if remark and spectrum.method else spectrum


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
        lefts, rights = torch.stack([p.left for p in pairs]), torch.stack([p.right for p in pairs])
        grams = None
        if batched(pairs[0], top) == CHOLESKY_CORE:
            grams = torch.stack([p.grams[0] for p in pairs]), torch.stack([p.grams[1] for p in pairs])
        found = factored.factored_svd(lefts, rights, top, grams)
    else:
        stacked = torch.stack([form.matrix for form in forms if isinstance(form, Dense)])
        found = dense.gram_top(stacked, top) if top else (dense.gram_values(stacked), None, None)
    S, U, Vh = found
    for i in range(len(forms)):
        yield S[i], None if U is None else U[i], None if Vh is None else Vh[i]
