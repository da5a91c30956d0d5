"""Whether there was a second rounding, by how much the update jumps where the step does.

Where |w| passes a power of two the step of a grid doubles, and the update has no reason to. So the part of its squares
that jumps there, rather than grows smoothly with |w|, is rounding, whatever the update is: one of full rank, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_FEWEST = 2**12  # entries
_LEAST_SIZE = 0.6  # of an update's mean square relative to the step's: below it rounding takes more than it adds
_TAKEN = 0.5  # of the share, times step²/ΔW²: at updates of a step it came out at .3 in place of 1
_FEWEST_OF_A_STEP = 64  # entries of one size of step, without which they are left out


@dataclass(frozen=True)
class Jump:
    """How much of a second rounding is in the squares of an update.

    Attributes:
        share: 0 where there was none, 1 where there was one.
        error: its standard error, and what an update that is small beside the step takes from the share.
    """

    share: float
    error: float


def jump(squares: Tensor, sizes: Tensor, once: Tensor, more: Tensor) -> Jump | None:
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
    if squares.numel() < _FEWEST or float(squares.mean()) < _LEAST_SIZE * 12 * float(once.mean()):
        return None
    kinds, kind = torch.unique(more, return_inverse=True)
    counts = torch.bincount(kind, minlength=len(kinds))
    typical = torch.bincount(kind, weights=squares, minlength=len(kinds)) / counts
    weight = torch.where((counts < _FEWEST_OF_A_STEP) | (typical <= 0), 0.0, 1 / typical)[kind]
    unit = sizes.square().mean().sqrt()
    columns = torch.stack([torch.ones_like(sizes), sizes / unit, (sizes / unit).square(), more], 1) * weight[:, None]
    scale = columns.norm(dim=0)
    if not bool((scale > 0).all()):
        return None
    columns /= scale
    normal = columns.mT @ columns
    if float(torch.linalg.cond(normal)) > 1e12:
        return None
    wanted = (squares - once) * weight
    found = torch.linalg.solve(normal, columns.mT @ wanted)
    spread = columns * (wanted - columns @ found)[:, None]
    inverse = torch.linalg.inv(normal)
    variance = float((inverse @ (spread.mT @ spread) @ inverse)[3, 3])
    taken = _TAKEN * 12 * float(once.mean() / squares.mean())
    return Jump(float(found[3] / scale[3]), math.sqrt(max(variance, 0.0)) / float(scale[3]) + taken)
