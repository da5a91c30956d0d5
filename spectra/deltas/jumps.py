"""Whether there was a second rounding, by how much the update jumps where the step does.

Where |w| passes a power of two the step of a grid doubles, and the update has no reason to. So the part of its squares
that jumps there, rather than grows smoothly with |w|, is rounding, whatever the update is: one of full rank, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FEWEST = 2**12  # entries
_LEAST_SIZE = 0.6  # of an update's mean square relative to the step's: below it rounding takes more than it adds
_TAKEN = 0.5  # of the share, times step²/ΔW²: at updates of a step it came out at .3 in place of 1
_FEWEST_OF_A_STEP = 64  # entries of one size of step, without which they are left out


_HIDES = 1e5  # times a second rounding's variance


@dataclass(frozen=True)
class Jump:
    """How much of a second rounding is in the squares of an update.

    Attributes:
        share: 0 where there was none, 1 where there was one.
        error: its standard error, and what an update that is small beside the step takes from the share.
    """

    share: float
    error: float


def hides_jumps(mean_square: float, most: float) -> bool:
    """Whether an update is so large that no second rounding can be seen in it, whatever the fit would say.

    The squares of c + e, with e of variance v, vary by 2c√v at the least, were c the same everywhere. Of at most 2¹⁹
    entries with c² = 10⁵ v the share then has a standard error of 0.87 or more, with which it tells nothing.

    Args:
        mean_square: of the entries of ΔW.
        most: the variance that a second rounding can have in any of them.
    """
    return mean_square > _HIDES * most


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def jump(squares: np.ndarray, sizes: np.ndarray, once: np.ndarray, more: np.ndarray) -> Jump | None:
    r"""Fit ΔW² = smooth(|w|) + once + share·more, smooth of degree two, each size of step weighted by its spread.

    Args:
        squares: of entries of ΔW.
        sizes: |w| of the same entries of the base.
        once: the variance that one rounding leaves in each.
        more: what a second one would add.

    Returns:
        The share; None where the entries are few, hardly move, or all have one step.

    Reference: White 1980 (heteroskedasticity-consistent errors).
    """
    if squares.size < FEWEST or float(squares.mean()) < _LEAST_SIZE * 12 * float(once.mean()):
        return None
    kinds, kind = _kinds(more)
    counts = np.bincount(kind, minlength=len(kinds))
    typical = np.bincount(kind, weights=squares, minlength=len(kinds)) / counts
    few = (counts < _FEWEST_OF_A_STEP) | (typical <= 0)
    weight = np.divide(1, typical, out=np.zeros(len(kinds)), where=~few)[kind]
    relative = sizes / math.sqrt(np.square(sizes).mean())
    columns = np.stack([np.ones_like(sizes), relative, np.square(relative), more]) * weight
    scale = np.sqrt(np.square(columns).sum(1))
    if not (scale > 0).all():
        return None
    columns /= scale[:, None]
    normal = columns @ columns.T
    if not np.isfinite(normal).all() or np.linalg.cond(normal) > 1e12:
        return None
    wanted = (squares - once) * weight
    found = np.linalg.solve(normal, columns @ wanted)
    off = (wanted - found @ columns) * (np.linalg.inv(normal)[3] @ columns)
    taken = _TAKEN * 12 * float(once.mean() / squares.mean())
    return Jump(float(found[3] / scale[3]), math.sqrt(float(off @ off)) / float(scale[3]) + taken)


def _kinds(more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values, ascending, and which of them each one is: by their exponents, mostly a value of each.

    Sorting all of them took half of the time of the fit.
    """
    exponents = more.view(np.int64) >> 52
    exponents -= exponents.min()
    one_of = np.full(int(exponents.max()) + 1, math.nan)
    one_of[exponents] = more
    if not np.array_equal(one_of[exponents], more):
        kinds, kind = np.unique(more, return_inverse=True)
        return kinds, kind
    there = ~np.isnan(one_of)
    return one_of[there], (np.cumsum(there) - 1)[exponents]
