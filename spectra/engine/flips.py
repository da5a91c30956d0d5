"""The rounding edge as the update itself shows it: how large its rest would be if the signs of its entries were chance.

The edge of a model (`deltas.rounding`) has to leave room for every way in which rows, columns and single entries can
stand out, and came out at 1.03 to 3.4 times the largest value of the true errors. What is left of ΔW without the
directions that stand out has the errors' own sizes, entry by entry. With signs drawn anew it has no directions left,
and the errors' largest value.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from spectra.deltas.forms import Dense
from spectra.deltas.rounding import Noise
from spectra.deltas.thin import times

_DRAWS, _LARGE = 3, 1024  # above that size the largest value hardly varies
_BLOCK_ENTRIES = 2**18  # signs at once
_MOST_SHARE = 1 / 8  # of all directions; where more stand out, what is left is no longer mostly errors
_MOST_ROUNDS = 4
SINGLE = 1e-3  # of σ₁, an edge above which float32 tells the directions above it from the rest
_LOST = 1e-12  # of ‖ΔW‖²: an energy that small drowns in the rounding of the sums
# Errors follow the update a little where it is less than a step; the largest value came out 4 % below theirs.
_MARGIN = 1.05
_CHANCE = 2.02 * 0.315  # times s^(−2/3): see `deltas.rounding`
_SPARE_COLUMNS, _LENGTH = 3, 12  # of the Krylov space: a thousandth below the largest value at 1024 and 2048
_SMALL = 2**14  # entries up to which that space is most of the whole, and its bases cost more than all values
_SPARE, _STEPS = 8, 4  # columns and steps of the subspace iteration


def with_flips(noise: Noise, form: Dense, S: np.ndarray) -> Noise:
    r"""The noise with its edge lowered to what ΔW shows of it, where few directions stand out.

    The k values above the edge are taken out with their vectors, every entry of the rest is multiplied by ±1 at random,
    and the largest singular value of that, over √((1 − k/m)(1 − k/n)) for the errors that went with the k, is the edge.
    As long as it is lower than the one before, more values may be above it, and it is done again.

    Args:
        noise: what the spectrum does not refute.
        form: ΔW.
        S: its values, all or the top ones.

    Reference: Hong, Sheng & Dobriban 2020, "Selecting the number of components in PCA via random signflips".
    """
    found, before = noise, -1
    for _ in range(_MOST_ROUNDS if noise.energy > _LOST * form.norm**2 else 0):
        k = int((found.edge < S).sum())
        if k <= before or k >= len(S) or k > _MOST_SHARE * min(form.shape):
            break
        before, edge = k, _edge(form, k, found.edge, float(S[0]))
        if edge >= found.edge:
            break
        found = replace(found, edge=edge)
    return found


def _edge(form: Dense, k: int, edge: float, largest: float) -> float:
    """From the rest in float32, whose largest value is not needed to more than a percent, at half the time."""
    m, n = form.shape
    rest = _rest(form.matrix, k, edge, largest)
    drawn = [edge * value for value in (_together if m * n <= _SMALL else _in_turn)(rest, k)]
    kept = math.sqrt((1 - k / m) * (1 - k / n))
    return (_MARGIN + _CHANCE * min(m, n) ** (-2 / 3)) * sum(drawn) / len(drawn) / kept


def _in_turn(rest: Tensor, seed: int) -> list[float]:
    """The largest value for each draw of signs, which is written over the rest."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(_DRAWS if min(rest.shape) < _LARGE else 1):
        _flip(rest, generator)
        drawn.append(float(top_values(rest, 1)[0]))
    return drawn


def _together(rest: Tensor, seed: int) -> list[float]:
    """The same of a small one for all draws at once, exactly: of thousands of matrices each call counts."""
    flipped = rest * _signs(*rest.shape, seed).to(rest.device)
    wide = flipped if rest.shape[0] <= rest.shape[1] else flipped.mT
    found: list[float] = torch.linalg.eigvalsh(wide @ wide.mT)[:, -1].clamp(min=0).sqrt().tolist()
    return found


@lru_cache(maxsize=32)
def _signs(m: int, n: int, seed: int) -> Tensor:
    """What `_in_turn` multiplies a matrix by, draw by draw: (draws, m, n), float32."""
    generator, signs = torch.Generator().manual_seed(seed), torch.ones(_DRAWS, m, n)
    for i in range(_DRAWS):
        signs[i] = signs[i - 1]
        _flip(signs[i], generator)
    return signs


def _rest(matrix: Tensor, k: int, edge: float, largest: float) -> Tensor:
    """The matrix without its top k directions, over the edge, float32."""
    rest = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device)
    if not k:
        return torch.div(matrix, edge, out=rest)
    # Its own directions are known to 1e-6 of the largest value in float32: a thousandth of the edge, or float64.
    near = torch.div(matrix, edge, out=rest) if edge > SINGLE * largest else matrix
    U, S, Vh = (factor.to(torch.float64) for factor in top_vectors(near, k))
    left = U * (S if near is matrix else S * edge)
    height = max(1, _BLOCK_ENTRIES // matrix.shape[1])
    for start in range(0, matrix.shape[0], height):
        rows = slice(start, start + height)
        rest[rows] = torch.addmm(matrix[rows], left[rows], Vh, alpha=-1).div_(edge)
    return rest


def _flip(matrix: Tensor, generator: torch.Generator) -> None:
    """Every entry times ±1, some rows at a time."""
    height = max(1, _BLOCK_ENTRIES // matrix.shape[1])
    for start in range(0, matrix.shape[0], height):
        rows = matrix[start : start + height]
        signs = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8)
        rows.mul_(signs.mul_(2).sub_(1).to(rows.device))


def top_values(matrix: Tensor, count: int) -> np.ndarray:
    """The largest singular values to a part in a hundred, those that stand out to more digits: a block Krylov space."""
    generator = torch.Generator().manual_seed(count)
    width = min(count + _SPARE_COLUMNS, *matrix.shape)
    block, blocks = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix), []
    for _ in range(max(1, min(_LENGTH, min(matrix.shape) // width))):
        blocks.append(torch.linalg.qr(times(matrix, block)).Q)
        block = times(matrix.mT, blocks[-1])
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
    found = torch.linalg.svdvals(times(matrix.mT, basis))[:count].cpu().numpy()
    return np.pad(found, (0, count - len(found)))


def top_vectors(matrix: Tensor, k: int, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S and Vh (k, n) of the top k values, which stand out, to a percent: subspace iteration.

    Args:
        matrix: (m, n).
        k: how many.
        near: Vh of a matrix like this one.
    """
    generator = torch.Generator().manual_seed(k)
    spare = min(k + _SPARE, *matrix.shape) - (0 if near is None else k)
    start = torch.randn(matrix.shape[1], spare, generator=generator, dtype=torch.float64).to(matrix)
    block = times(matrix, start if near is None else torch.cat([near.mT, start], 1))
    for _ in range(_STEPS if near is None else 1):
        block = times(matrix, times(matrix.mT, torch.linalg.qr(block).Q))
    basis = torch.linalg.qr(block).Q
    u, s, vh = torch.linalg.svd(times(matrix.mT, basis).mT, full_matrices=False)
    return times(basis, u[:, :k]), s[:k], vh[:k]
