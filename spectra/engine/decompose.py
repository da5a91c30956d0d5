"""The one streaming loop: deltas in, spectra out as they finish, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from spectra.deltas.at_work import Account, announce
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense
from spectra.engine.accounts import account_of
from spectra.engine.costs import flops
from spectra.engine.devices import cores, device_named, resolve_device
from spectra.engine.executors.device import decompose_batches
from spectra.engine.executors.threads import keep_freed_memory, thread_executor
from spectra.engine.memory import memory_budget, readable_size
from spectra.engine.schedule import Batch, Plan, batches, bundles, plan, side_by_side
from spectra.engine.solve import Wanted, solve, solve_together
from spectra.engine.solvers.calibration import calibrate, concerns, hinder
from spectra.engine.solvers.eigenvalues import Library, is_numpy_limited, numpy_on_one_core
from spectra.errors import SelectionError
from spectra.files.far import done, expected
from spectra.files.patience import give_up
from spectra.spectrum import Spectrum

_PER_WORKER = 2  # in flight per worker of another process, or of small matrices: one at work, one waiting


def decompose_indexed(
    deltas: Sequence[WeightDelta],
    *,
    top: int | None = None,
    only_top: bool = False,
    device: str = "auto",
    executor: Executor | None = None,
    budget: int | str | None = None,
    threads: int | None = None,
    account: Account | None = None,
    look: Callable[[list[Spectrum]], None] | None = None,
) -> Iterator[tuple[int, Spectrum]]:
    """Each delta's position in the input and its spectrum, as soon as it is finished: not in the input's order.

    Deltas travel to an `executor` as recipes; without one they are solved in this process.

    Args:
        top: None for singular values only; K for all values and the top K vectors.
        only_top: the top K values and vectors alone.
        budget: bytes or "4GiB" for all matrices at work together; None for half of what is free.
        threads: how many each matrix gets on this machine's CPU; the other cores take other matrices. None: what
            `threads_for` finds best. The last bits of a result can depend on it.
        account: of a plan that these are a part of, which is announced already; None where they are all of it.
        look: gets the results of small matrices that are solved together here, as soon as they are.

    Raises:
        SelectionError: top is not positive, or only_top without top.
        DeviceError: the device is not there.
    """
    if top is not None and top < 1:
        raise SelectionError(f"top = {top} is not a positive number of vectors; leave it out for values only")
    if only_top and top is None:
        raise SelectionError("only_top needs top: how many triplets?")
    if account is None:
        account = announce(account_of(deltas, top, only_top=only_top, device=device, executor=executor))
    yield from _scheduled(deltas, Work(top, only_top, device, look), executor, budget, threads, account)


def _scheduled(
    deltas: Sequence[WeightDelta],
    work: Work,
    executor: Executor | None,
    budget: int | str | None,
    threads: int | None,
    account: Account,
) -> Iterator[tuple[int, Spectrum]]:
    """Those that fit the budget, where they are to be solved; of the others, what they need."""
    top = work.top
    where = work.device if executor is not None else resolve_device(work.device)
    schedule = plan(deltas, _bytes_at_work(budget, where, executor), top)
    for index, bytes_needed in schedule.too_large.items():
        there = readable_size(schedule.budget)
        reason = f"needs {readable_size(bytes_needed)}, the budget is {there}; raise memory_budget= (--memory)"
        delta = deltas[index]
        account.total -= flops(delta, top)
        yield index, Spectrum(delta.name, delta.shape, "too_large", max_rank=delta.max_rank, reason=reason)
    work = replace(work, device=where)
    planned = {task.index: task.flops for task in schedule.tasks}
    account.costs = {deltas[index].name: cost for index, cost in planned.items()}
    with closing(_in_turn(deltas, schedule, work, executor, threads)) as stream:
        for index, spectrum in stream:
            account.finish(spectrum.name, planned[index])
            yield index, spectrum
            done(deltas[index].refs)  # whoever keeps results has kept it


def _in_turn(
    deltas: Sequence[WeightDelta], schedule: Plan, work: Work, executor: Executor | None, threads: int | None
) -> Generator[tuple[int, Spectrum], None, None]:
    """Those of the plan, where they are to be solved; what is far away is fetched ahead."""
    if executor is not None and not isinstance(executor, ThreadPoolExecutor):
        yield from _through(executor, deltas, schedule, replace(work, look=None))  # others read, each for itself
        return
    in_turn = [deltas[task.index].refs for task in schedule.tasks]
    with expected(in_turn, fetches=len(in_turn) > 1):
        if executor is not None:
            yield from _through(executor, deltas, schedule, work)
        elif work.device.startswith("cuda"):
            wanted = Wanted(work.top or 0, work.only_top, device_named(work.device), together=True)
            yield from decompose_batches(deltas, batches(deltas, schedule), wanted)
        else:
            yield from _side_by_side(deltas, schedule, work, threads)


def threads_for(
    deltas: Sequence[WeightDelta], *, top: int | None = None, device: str = "auto", budget: int | str | None = None
) -> int | None:
    """How many threads to give each matrix on this machine's CPU; None if the CPU is not where they go."""
    where = resolve_device(device)
    if where != "cpu":
        return None
    schedule = plan(deltas, memory_budget(budget), top)
    return max(1, cores() // side_by_side(schedule, cores()))


def libraries_for(deltas: Iterable[WeightDelta], threads: int | None) -> dict[int, Library]:
    """Whose eigenvalues dense matrices of each size get on this machine's CPU; measured first if nobody has.

    Args:
        threads: that each matrix has; none but torch's are used where it is not one.
    """
    sizes = [min(delta.shape) for delta in deltas if delta.form is Dense]
    if threads != 1:
        return {}
    if not concerns(sizes):
        return calibrate(sizes)  # which has nothing to measure, and keeps why
    with numpy_on_one_core():
        if not is_numpy_limited():
            hinder("numpy's library cannot be held at one core here")
            return {}
        with thread_executor(1, 1) as one_core:
            return one_core.submit(calibrate, sizes).result()


@dataclass(frozen=True)
class Work:
    """What to do with every delta; travels to executors.

    Attributes:
        top: how many singular vectors; None for none.
        only_top: keep the top values alone, too.
        device: "auto" for the one of the machine where it runs.
        look: gets the results of those that are solved together, as soon as they are.
    """

    top: int | None
    only_top: bool
    device: str
    look: Callable[[list[Spectrum]], None] | None = None

    def __call__(self, delta: WeightDelta) -> Spectrum:
        """Solve it where this runs."""
        with expected([delta.refs]):
            return solve(delta, top=self.top, only_top=self.only_top, device=resolve_device(self.device))

    def together(self, deltas: Sequence[WeightDelta]) -> list[Spectrum]:
        """Solve several where this runs, in their order."""
        with expected([delta.refs for delta in deltas]):
            device = resolve_device(self.device)
            found = solve_together(deltas, top=self.top, only_top=self.only_top, device=device)
        if self.look is not None:
            self.look(found)
        return found


def _side_by_side(
    deltas: Sequence[WeightDelta], schedule: Plan, work: Work, threads: int | None
) -> Iterator[tuple[int, Spectrum]]:
    """On this machine's CPU: several matrices at once, each on its share of the cores."""
    keep_freed_memory()
    workers = side_by_side(schedule, cores())
    share = threads or max(1, cores() // workers)
    libraries_for([deltas[task.index] for task in schedule.tasks], share)
    with numpy_on_one_core() if share == 1 else nullcontext():
        if workers == 1 and share == torch.get_num_threads():
            for bundle in bundles(deltas, schedule, 1):
                indices = [task.index for task in bundle.tasks]
                yield from zip(indices, work.together([deltas[index] for index in indices]), strict=True)
            return
        with thread_executor(min(workers, max(1, cores() // share)), share) as pool:
            yield from _through(pool, deltas, schedule, work)


def _through(
    executor: Executor, deltas: Sequence[WeightDelta], schedule: Plan, work: Work
) -> Iterator[tuple[int, Spectrum]]:
    """Keep the executor fed while the bytes in flight stay under the budget."""
    here = isinstance(executor, ThreadPoolExecutor)
    waiting = bundles(deltas, schedule, _workers(executor)) if here else [Batch((task,)) for task in schedule.tasks]
    waiting.reverse()
    alone = executor.signed(work) if hasattr(executor, "signed") else work
    sent: Callable[[Any], Any] = work.together if here else alone
    running: dict[Future[Any], Batch] = {}
    broken = ""
    try:
        while waiting or running:
            while waiting and _room(executor, running, waiting[-1], schedule.budget):
                batch = waiting.pop()
                members = [deltas[task.index] for task in batch.tasks]
                try:
                    given: Any = members if here else members[0]
                    running[executor.submit(sent, given)] = batch
                except BrokenExecutor as problem:
                    broken = f"the executor broke ({type(problem).__name__}), solved by the driver"
                    for task in batch.tasks:
                        yield task.index, _noted(work(deltas[task.index]), broken)
            for future in _finished(executor, running):
                indices = [task.index for task in running.pop(future).tasks]
                yield from zip(indices, _outcomes(executor, future, [deltas[i] for i in indices]), strict=True)
    finally:
        if running:
            give_up()  # a server that is silent would hold the threads, and with them whoever stopped this
        for future in running:
            future.cancel()


def _workers(executor: Executor) -> int:
    return getattr(executor, "_max_workers", None) or 1


def _finished(executor: Executor, running: Mapping[Future[Any], Batch]) -> Collection[Future[Any]]:
    """Those that are finished, at least one; where that takes long, the executor is asked whether one can be."""
    while running:
        done = wait(running, timeout=getattr(executor, "patience", None), return_when=FIRST_COMPLETED).done
        if done:
            return done
        executor.watch()  # type: ignore[attr-defined]
    return ()


def _room(executor: Executor, running: Mapping[Future[Any], Batch], batch: Batch, budget: int) -> bool:
    """Whether one more batch may be handed in: a little more than there are workers, and within the budget."""
    if not running:
        return True
    workers = _workers(executor)
    alone = isinstance(executor, ThreadPoolExecutor) and len(batch.tasks) == 1
    most = workers if alone else _PER_WORKER * workers
    if getattr(executor, "own_memory", False):  # the budget is each worker's
        return len(running) < most
    return len(running) < most and sum(other.bytes for other in running.values()) + batch.bytes <= budget


def _outcomes(executor: Executor, future: Future[Any], members: Sequence[WeightDelta]) -> list[Spectrum]:
    """The results, or failed ones if the worker was lost; errors of our own are not hidden."""
    accept, refuse = getattr(executor, "accept", None), getattr(executor, "refuse", None)
    problem = CancelledError("cancelled") if future.cancelled() else future.exception()
    if problem is None:
        found = future.result() if isinstance(executor, ThreadPoolExecutor) else [future.result()]
        return found if accept is None else [accept(*one) for one in zip(members, found, strict=True)]
    if refuse is not None:
        refuse(problem)
    if not _lost(problem):
        raise problem
    reason = f"its worker was lost ({type(problem).__name__}: {problem}); run the command again to try once more"
    return [Spectrum(one.name, one.shape, "failed", max_rank=one.max_rank, reason=reason) for one in members]


def _lost(problem: BaseException) -> bool:
    """Whether an exception tells of the executor's death rather than of the work."""
    by_dask = type(problem).__module__.split(".")[0] == "distributed"
    return by_dask or isinstance(problem, BrokenExecutor | CancelledError | ConnectionError)


def _noted(spectrum: Spectrum, note: str) -> Spectrum:
    """The result with how else it came about beside the solver."""
    return replace(spectrum, method=f"{spectrum.method}; {note}" if spectrum.method else note)


def _bytes_at_work(budget: int | str | None, device: str, executor: Executor | None) -> int:
    """The budget that was given, or a share of what is free where the matrices will be."""
    if budget is not None:
        return memory_budget(budget)
    elsewhere: int | None = getattr(executor, "memory_budget", None)
    return elsewhere or device_named("cpu" if executor else device).budget()
