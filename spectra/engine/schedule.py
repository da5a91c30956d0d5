"""Pure: in which order to decompose, what goes side by side or as one batch, and what does not fit the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import SMALL, Dense
from spectra.engine.costs import cost

_STACKED = 96  # bytes for each entry while a bundle is read: both weights, what rounding may have done, and bits
_CACHED = 2**17  # entries of a bundle: 1 MiB in float64
_ROUNDS = 4  # bundles for each worker at least, so that none is left alone with the last one for long
_MOST_ENTRIES = 2**31 - 1  # of a batch: solvers on a card count in 32 bits (pytorch issue 102963)


@dataclass(frozen=True)
class Task:
    """One delta in the plan: its place in the input, what it costs and what it needs.

    Attributes:
        index: the delta's position in the input.
        flops: a rough count of floating-point operations.
        bytes: peak working memory, without the interpreter.
        entries: how many are copied where it is stacked with others.
    """

    index: int
    flops: float
    bytes: int
    entries: int = 0


@dataclass(frozen=True)
class Plan:
    """Tasks in the order to start them, and the positions of deltas above the budget with what they need."""

    tasks: tuple[Task, ...]
    too_large: dict[int, int]
    budget: int


def plan(deltas: Sequence[WeightDelta], budget: int, top: int | None = None) -> Plan:
    """Longest first, so that no worker is left with the largest matrix at the end; ties in input order.

    Example:
        >>> import torch
        >>> small, large = (WeightDelta.from_tensor(str(n), torch.eye(n)) for n in (2, 4))
        >>> [task.index for task in plan([small, large], budget=2**20).tasks]
        [1, 0]
    """
    costs = [cost(delta, top) for delta in deltas]
    tasks = [Task(i, known.flops, known.bytes, known.entries) for i, known in enumerate(costs)]
    too_large = {task.index: task.bytes for task in tasks if task.bytes > budget}
    fitting = [task for task in tasks if task.index not in too_large]
    return Plan(tuple(sorted(fitting, key=lambda task: -task.flops)), too_large, budget)


def side_by_side(schedule: Plan, cores: int) -> int:
    """How many matrices to solve at once on these cores: as many as there are cores, matrices and bytes for.

    One thread per matrix beats all threads on one matrix after another where there are at least two
    matrices (measured at 2048² and 4096² on a Xeon; on an EPYC the two tie at 4096²).

    Example:
        >>> tasks = tuple(Task(i, 1.0, 100) for i in range(3))
        >>> side_by_side(Plan(tasks, {}, budget=250), cores=8)
        2
    """
    largest = sorted((task.bytes for task in schedule.tasks if task.flops), reverse=True)
    workers = max(1, min(cores, len(largest)))
    while workers > 1 and sum(largest[:workers]) > schedule.budget:
        workers -= 1
    return workers


@dataclass(frozen=True)
class Batch:
    """Tasks of equal shape to solve as one on a device.

    Attributes:
        tasks: the tasks.
        ahead: whether it may be read while the batch before it is at work: the budget holds both.
    """

    tasks: tuple[Task, ...]
    ahead: bool = True

    @property
    def bytes(self) -> int:
        """What all of it needs at once, with the copies side by side."""
        copies = 8 * sum(task.entries for task in self.tasks) if len(self.tasks) > 1 else 0
        return sum(task.bytes for task in self.tasks) + copies


def bundles(deltas: Sequence[WeightDelta], schedule: Plan, workers: int) -> list[Batch]:
    """The plan's tasks in its order: small matrices of equal shape together, every other alone.

    For cores: a matrix that they do not solve in one piece gains nothing from company, and takes memory for it.

    Args:
        deltas: what the plan is about.
        schedule: the plan.
        workers: how many bundles are at work at once; there are enough for all of them.

    Example:
        >>> import torch
        >>> deltas = [WeightDelta.from_tensor(str(i), torch.eye(size)) for i, size in enumerate([2, 200, 2, 200])]
        >>> [[task.index for task in one.tasks] for one in bundles(deltas, plan(deltas, 2**30), workers=1)]
        [[1], [3], [0], [2]]
    """
    groups: dict[object, list[Task]] = {}
    for task in schedule.tasks:
        delta = deltas[task.index]
        small = delta.form is Dense and 0 < task.entries <= SMALL
        groups.setdefault((delta.shape, delta.factored) if small else task.index, []).append(task)
    planned = []
    for tasks in groups.values():
        entries = tasks[0].entries
        each = tasks[0].bytes + _STACKED * entries
        fair = -(-len(tasks) // (_ROUNDS * workers))
        size = max(1, min(_CACHED // max(1, entries), schedule.budget // workers // max(1, each), fair))
        planned += [Batch(tuple(tasks[start : start + size])) for start in range(0, len(tasks), size)]
    return planned


def batches(deltas: Sequence[WeightDelta], schedule: Plan, most: int = 64) -> list[Batch]:
    """The plan's tasks in groups of equal shape, form and rank, the costliest shape first.

    Two batches are on the device at a time, one at work and one being read, so each takes at most half
    of the budget; a matrix that needs more than half is not read before the one in front of it is done.

    Args:
        deltas: what the plan is about.
        schedule: the plan.
        most: how many matrices at most in one batch.

    Example:
        >>> import torch
        >>> deltas = [WeightDelta.from_tensor(str(i), torch.eye(size)) for i, size in enumerate([2, 4, 2])]
        >>> [[task.index for task in batch.tasks] for batch in batches(deltas, plan(deltas, 2**20))]
        [[1], [0, 2]]
    """
    groups: dict[tuple, list[Task]] = {}
    for task in schedule.tasks:
        delta = deltas[task.index]
        groups.setdefault((delta.shape, delta.form, delta.max_rank), []).append(task)
    planned: list[Batch] = []
    for tasks in groups.values():
        each, entries = tasks[0].bytes + 8 * tasks[0].entries, tasks[0].entries
        size = max(1, min(most, schedule.budget // 2 // max(1, each), _MOST_ENTRIES // max(1, entries)))
        for start in range(0, len(tasks), size):
            batch = Batch(tuple(tasks[start : start + size]))
            before = planned[-1].bytes if planned else 0
            planned.append(replace(batch, ahead=before + batch.bytes <= schedule.budget))
    return planned
