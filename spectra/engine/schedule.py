"""Pure: in which order to decompose, how many bytes each matrix takes, and which do not fit."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spectra.deltas.delta import WeightDelta
from spectra.deltas.products import KroneckerProduct
from spectra.errors import SelectionError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
FRACTION_OF_FREE = 0.5


@dataclass(frozen=True)
class Task:
    """One delta in the plan: its place in the input, what it costs and what it needs.

    Attributes:
        index: the delta's position in the input.
        flops: a rough count of floating-point operations.
        bytes: peak working memory, without the interpreter.
    """

    index: int
    flops: float
    bytes: int


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
    tasks = [Task(i, flops(delta, top), needed(delta, top)) for i, delta in enumerate(deltas)]
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
        """What all of it needs at once."""
        return sum(task.bytes for task in self.tasks)


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
        groups.setdefault((delta.shape, delta.factored, delta.max_rank, delta.recipe is None), []).append(task)
    found: list[Batch] = []
    for tasks in groups.values():
        size = max(1, min(most, schedule.budget // 2 // max(1, tasks[0].bytes)))
        for start in range(0, len(tasks), size):
            batch = Batch(tuple(tasks[start : start + size]))
            before = found[-1].bytes if found else 0
            found.append(replace(batch, ahead=before + batch.bytes <= schedule.budget))
    return found


# CUDA compute capabilities with float64 at half the float32 rate: P100, V100, A100, H100 and H200, B200.
_FULL_RATE = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})


def full_rate_double(major: int, minor: int) -> bool:
    """Whether a CUDA card of a compute capability computes float64 at full rate: half of its float32 rate.

    On all other cards it runs at 1/32 or 1/64, and a capability that is not known here counts as such. The
    engine then does the same: float64 on the card, for an update's factors cost little anywhere, and for dense
    updates even 1/64 of a card is as fast as several CPU cores; float32 would not keep 1e-7·σ₁. What it does
    differently is to say so: each result's `method` ends with `slow_double`'s note, and `--device cpu` is the
    other exact choice. `python -m benchmarks.gpu` measures both on the card at hand.

    Example:
        >>> [full_rate_double(*capability) for capability in [(8, 0), (8, 6), (9, 0), (12, 0)]]
        [True, False, True, False]

    Reference: NVIDIA, CUDA C++ Programming Guide, "Arithmetic Instructions" (throughput by compute capability).
    """
    return (major, minor) in _FULL_RATE


def slow_double(major: int, minor: int) -> str:
    """What to say of a card whose float64 is slow; "" of one where it is not.

    Example:
        >>> slow_double(8, 9)
        'float64 on a card that is slow at it (compute capability 8.9)'
        >>> slow_double(9, 0)
        ''
    """
    if full_rate_double(major, minor):
        return ""
    return f"float64 on a card that is slow at it (compute capability {major}.{minor})"


def flops(delta: WeightDelta, top: int | None) -> float:
    """A rough operation count: QR and core SVD for factors, Gram and eigenvalues for a dense update."""
    if delta.recipe is None or len(delta.shape) != 2:
        return 0.0
    short, long = sorted(delta.shape)
    if _is_kronecker(delta):
        return 20.0 * (short * long) ** 0.75  # two sides of about (√m, √n)
    if delta.factored:
        r = delta.max_rank
        return 4.0 * (short + long) * r**2 * (2 if top else 1) + 20.0 * r**3
    return short**2 * long + (9.0 if top else 4 / 3) * short**3


def needed(delta: WeightDelta, top: int | None) -> int:
    """Peak bytes while the delta is read or solved by the solvers that usually do it; a test measures them.

    Dense: the stored rows, ΔW in float64, and the Gram matrix with its eigensolver's copy or, for vectors,
    work space. Factors: the stored ones, float64, their reflectors, and the vectors. Only the last rung of
    the ladder, a full SVD of ΔW, takes more.
    """
    if delta.recipe is None or len(delta.shape) != 2:
        return 0
    stored = sum(_width(ref.dtype) * ref.numel for ref in _refs(delta))
    reading: int = getattr(delta.recipe, "reading_bytes", 0)
    return max(_solving(delta, top, stored), reading + stored if reading else 0)


def _solving(delta: WeightDelta, top: int | None, stored: int) -> int:
    m, n = delta.shape
    short = min(m, n)
    k = min(top or 0, short)
    if _is_kronecker(delta):
        return 8 * (4 * k * (m + n) + 2 * short) + 40 * sum(ref.numel for ref in _refs(delta)) + _base_bytes(delta)
    if delta.factored:
        r = delta.max_rank
        return 8 * ((3 * r + 3 * k) * (m + n) + 8 * r**2) + stored + _base_bytes(delta)
    blocks = 4 * max(64, 4 * k) * short + 3 * k * (m + n) if k else 0
    return 8 * (m * n + (5 * short**2 if k else 5 * short**2 // 2) + blocks) + stored


def _is_kronecker(delta: WeightDelta) -> bool:
    return isinstance(delta.recipe, KroneckerProduct)


def _refs(delta: WeightDelta) -> Sequence:
    return delta.refs


def _base_bytes(delta: WeightDelta) -> int:
    full = delta.shape[0] * delta.shape[1]
    return max((9 * ref.numel for ref in _refs(delta) if ref.numel == full), default=0)


def _width(dtype: str) -> int:
    from spectra.files.tensors import DTYPES

    return DTYPES[dtype][1] if dtype in DTYPES else 8


def memory_budget(given: int | str | None) -> int:
    """Bytes from a number, a text such as "4GiB", or half of what is free.

    Raises:
        SelectionError: the text is not a size.

    Example:
        >>> memory_budget("4GiB")
        4294967296
    """
    if given is None:
        return int(free_memory() * FRACTION_OF_FREE)
    if isinstance(given, int):
        return given
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", given)
    if not found or found[2].upper() not in _UNITS:
        raise SelectionError(f"{given!r} is not a size; write it as 4GiB or 800MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def free_memory() -> int:
    """Bytes that can be had without swapping, by the kernel's own estimate where it gives one."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def readable_size(count: int) -> str:
    """Bytes as people write them.

    >>> readable_size(3 * 2**29)
    '1.5 GiB'
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
