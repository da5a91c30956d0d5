"""What independent errors of known variances can do at most: sums of their steps, and what stands out above the edge.

All of it for stacks of matrices of one shape (b, m, n), row by row: no number of one depends on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_NORMAL_99 = 2.33
_SPREAD = {1: 1 / 180, 2: 1.4 / 144}  # Var e² / step⁴ of one rounding and, at most, of two
_LEAST, _WIDER = 1e-300, 1 + 1e-9  # room for rounding in a bound
BLOCK_ENTRIES = 2**16  # half a MiB, which stays in the cache

Part = Any  # an index into a stack of matrices (b, m, n)
Steps = Callable[[Part], "Tensor"]  # the sum of the squared steps of all roundings, at each entry of a part


def kept(steps: Steps, shape: torch.Size) -> Steps:
    """The same steps, of matrices of one block computed once: for small ones asking again costs more than they do."""
    if math.prod(shape[1:]) > BLOCK_ENTRIES:
        return steps
    whole = steps(slice(None))
    return lambda part: whole[part]


def own(steps: Steps, place: int, part: Part) -> Tensor:
    """The steps of one matrix of a stack."""
    return steps((place, part))


def variance_sums(steps: Steps, shape: torch.Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column sums of step²/12 and each row's largest step²."""
    rows, columns, highest = sums(steps, shape)
    return rows / 12, columns / 12, highest


def sums(entries: Steps, shape: torch.Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row sums (b, m), column sums (b, n) and each row's largest entry (b, m), a block of rows at a time."""
    height = max(1, BLOCK_ENTRIES // shape[2])
    rows, highest, columns = [], [], torch.zeros(())
    for start in range(0, shape[1], height):
        steps = entries((slice(None), slice(start, start + height)))
        rows.append(steps.sum(2))
        highest.append(steps.amax(2))
        columns = steps.sum(1) if start == 0 else columns.add_(steps.sum(1))
    # Only now: on a card every number that is looked at waits for all that was asked before.
    of_rows, most = (rows[0], highest[0]) if len(rows) == 1 else (torch.cat(rows, 1), torch.cat(highest, 1))
    return of_rows.cpu().numpy(), columns.cpu().numpy(), most.cpu().numpy()


def wobble(squared: Tensor, variances: np.ndarray, edges: np.ndarray, roundings: int) -> np.ndarray:
    """How far chance may lift each edge through the norm of the errors in the largest row, or column.

    An error uniform in ±step/2 has E e² = step²/12 and Var e² = step⁴/180; of a sum of two, with variance v, Var e²
    is at most 1.4 v². The bulk averages this away; it counts as far as the row alone makes the edge.
    """
    assumed, squares = torch.stack([squared.sum(1), squared.square().sum(1)]).cpu().numpy()
    assumed /= 12  # more than the variance where most of the entries did not move
    told = (edges > 0) & (assumed > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt(squares * _SPREAD[roundings]) * np.minimum(variances / assumed, 1.0)
        lifted = np.sqrt(1 + _NORMAL_99 * np.square(variances / np.square(edges)) * spread / variances)
    return np.where(told, lifted, 1.0)


def may_spike(rows: np.ndarray, columns: np.ndarray, largest: np.ndarray, edges: np.ndarray) -> np.ndarray:
    r"""Whether any entry can make a value above the edge, from the largest θ² of each row alone; for each matrix.

    (θ² + r)(θ² + c)/θ² grows with c, which is less than θ⁴/r where an entry stands out, and then with θ².
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        beside = np.minimum(columns.max(-1, keepdims=True), np.square(largest) / np.maximum(rows, _LEAST))
        reached = ((largest + rows) * (largest + beside) / largest) * _WIDER
        may: np.ndarray = ((reached > np.square(edges)[..., None]) & (largest > 0)).any(-1)
    return may


def spike(
    steps: Steps, rows: np.ndarray, columns: np.ndarray, highest: np.ndarray, roundings: int, delta: Tensor | None
) -> float:
    r"""The largest value that the error of one entry, at most θ, makes among the others of its row and column.

    θ² is step²/4, and twice Σ step²/4 for two roundings. It stands out if θ⁴ > rᵢcⱼ, then as
    √((θ² + rᵢ)(θ² + cⱼ))/θ (Benaych-Georges & Nadakuditi 2012).
    """
    largest, least = 0.0, columns[columns > 0].min(initial=math.inf)
    suspect = np.square(highest * roundings / 4) > rows * least
    some = np.flatnonzero(suspect)
    height = max(1, BLOCK_ENTRIES // len(columns))
    for start in range(0, len(some), height):
        block = some[start : start + height]
        largest_errors = steps(block).mul(roundings / 4)
        if delta is not None:
            largest_errors = torch.minimum(largest_errors, delta[block].square())
        squared = largest_errors.cpu().numpy()
        i, j = np.nonzero(np.square(squared) > rows[block, None] * columns)
        if len(i):
            theta, r, c = squared[i, j], rows[block[i]], columns[j]
            largest = max(largest, float(((theta + r) * (theta + c) / theta).max()))
    return math.sqrt(largest)
