"""What a plan costs, counted before anything is read, and this machine's pace: for whoever tells the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

import torch

from spectra.deltas.at_work import Account
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense
from spectra.engine.costs import flops
from spectra.engine.devices import resolve_device
from spectra.engine.solve import solve

_PROBE = 1024  # rows and columns of a matrix that tells the pace: a quarter of a second
_STRONG = 16  # directions of such a matrix
_PROBE_OF_ALL = 512  # the same where all of its vectors are wanted


def account_of(
    deltas: Sequence[WeightDelta], top: int | None, *, only_top: bool, device: str, executor: Executor | None
) -> Account:
    """The account of decomposing all of them; arguments as for `decompose_indexed`."""
    each = [flops(delta, top) for delta in deltas]
    costs = {delta.name: cost for delta, cost in zip(deltas, each, strict=True)}
    largest = max(range(len(deltas)), key=each.__getitem__, default=None)
    is_dense = largest is not None and deltas[largest].form is Dense
    measure = partial(pace, top, only_top=only_top) if is_dense and _is_here(device, executor) else None
    return Account(costs, math.fsum(each), measure)


def account_of_all_vectors(costs: Mapping[str, float], *, device: str, executor: Executor | None) -> Account:
    """The account of matrices of which most of the time goes into all of their singular vectors.

    Args:
        costs: of each, by name, as `dense_flops` counts them.
        device: as for `decompose_indexed`.
        executor: as for `decompose_indexed`.
    """
    measure = partial(pace, _PROBE_OF_ALL, only_top=True, size=_PROBE_OF_ALL) if _is_here(device, executor) else None
    return Account(costs, math.fsum(costs.values()), measure)


def pace(top: int | None, *, only_top: bool, size: int = _PROBE) -> float:
    """Operations per second, as `flops` counts them, of a dense matrix of a usual size on this machine's CPU."""
    delta = probe(size)
    start = time.monotonic()
    solve(delta, top=top, only_top=only_top)
    return flops(delta, top) / (time.monotonic() - start)


def probe(size: int) -> WeightDelta:
    """A matrix to measure by, which no rung gives up: as in an update, some directions are stronger than the others."""
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn((size, size), generator=random) / size**0.5
    left, right = (torch.randn((size, _STRONG), generator=random) / size**0.5 for _ in "lr")
    matrix += left * torch.linspace(4, 2, _STRONG) @ right.T
    return WeightDelta.from_tensor("a matrix to measure the pace by", matrix)


def _is_here(device: str, executor: Executor | None) -> bool:
    """Whether matrices are solved on this machine's CPU."""
    return (executor is None or isinstance(executor, ThreadPoolExecutor)) and resolve_device(device) == "cpu"
