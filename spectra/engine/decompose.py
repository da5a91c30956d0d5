"""The one streaming loop: deltas in, spectra out as they finish, within a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait

from spectra.engine.plan import Plan, memory_budget, plan, readable_size
from spectra.engine.solve import solve
from spectra.errors import DeviceError, SelectionError
from spectra.types import Spectrum, WeightDelta

_PER_WORKER = 2  # tasks in flight per worker: one at work, one waiting


def decompose(
    source: Iterable[WeightDelta],
    *,
    top: int | None = None,
    only_top: bool = False,
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> Iterator[Spectrum]:
    """The singular spectrum of every delta, each as soon as it is finished: not in the input's order.

    Args:
        source: a `Source` or any deltas.
        top: None for singular values only; K for all values and the top K vectors.
        only_top: the top K values and vectors alone.
        device: "auto", "cpu", "cuda" or "cuda:i".
        executor: where to run; None for this process. Deltas travel to it as recipes.
        memory_budget: bytes or "4GiB" for all matrices at work together; None for half of what is free.

    Raises:
        SelectionError: top is not positive, or only_top without top.
        DeviceError: the device is not there.

    Example:
        >>> import torch
        >>> delta = WeightDelta.from_tensor("a.weight", torch.diag(torch.tensor([3.0, 4.0])))
        >>> [spectrum.S.tolist() for spectrum in decompose([delta])]
        [[4.0, 3.0]]
    """
    for _, spectrum in decompose_indexed(
        list(source), top=top, only_top=only_top, device=device, executor=executor, budget=memory_budget
    ):
        yield spectrum


def decompose_indexed(
    deltas: Sequence[WeightDelta],
    *,
    top: int | None = None,
    only_top: bool = False,
    device: str = "auto",
    executor: Executor | None = None,
    budget: int | str | None = None,
) -> Iterator[tuple[int, Spectrum]]:
    """As `decompose`, with each spectrum's position in the input."""
    if top is not None and top < 1:
        raise SelectionError(f"top = {top} is not a positive number of vectors; leave it out for values only")
    if only_top and top is None:
        raise SelectionError("only_top needs top: how many triplets?")
    where = resolve_device(device)
    schedule = plan(deltas, memory_budget(budget), top)
    for index, bytes_needed in schedule.too_large.items():
        reason = f"needs {readable_size(bytes_needed)}, the budget is {readable_size(schedule.budget)}; raise --memory"
        delta = deltas[index]
        yield index, Spectrum(delta.name, delta.shape, "too_large", max_rank=delta.max_rank, reason=reason)
    if executor is None:
        for task in schedule.tasks:
            yield task.index, solve(deltas[task.index], top=top, only_top=only_top, device=where)
    else:
        yield from _through(executor, deltas, schedule, top, only_top, where)


def _through(
    executor: Executor, deltas: Sequence[WeightDelta], schedule: Plan, top: int | None, only_top: bool, device: str
) -> Iterator[tuple[int, Spectrum]]:
    """Keep the executor fed while the bytes in flight stay under the budget."""
    waiting = list(reversed(schedule.tasks))
    running: dict[Future[Spectrum], tuple[int, int]] = {}
    limit = _PER_WORKER * (getattr(executor, "_max_workers", None) or 1)
    used = 0
    try:
        while waiting or running:
            while waiting and len(running) < limit and (not running or used + waiting[-1].bytes <= schedule.budget):
                task = waiting.pop()
                future = executor.submit(solve, deltas[task.index], top=top, only_top=only_top, device=device)
                running[future] = (task.index, task.bytes)
                used += task.bytes
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index, size = running.pop(future)
                used -= size
                yield index, future.result()
    finally:
        for future in running:
            future.cancel()


def resolve_device(device: str) -> str:
    """The device that "auto" means here, or the one asked for if it exists.

    Raises:
        DeviceError: it does not, or is not one that this toolkit uses.
    """
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise DeviceError(f"device {device!r} is not one of auto, cpu, cuda, cuda:0, …")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise DeviceError(f"device {device!r} is not there: torch sees {count} CUDA devices; use --device cpu")
    return device
