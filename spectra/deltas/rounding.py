r"""The storage-rounding floor: the largest singular value that rounding to bf16, fp16 or fp32 alone would give.

Rounding to nearest leaves in each entry an error of variance ulp²/12, nearly independent of the others.
Were all ulp equal, the largest singular value of the errors would be √(ulp²/12)·(√m + √n). Those of real
weights are not: rows and columns differ in scale, and a few entries stand out. So the edge is that of
independent errors whose variances have the weights' own row and column sums, or the value that one
outstanding entry can make by itself, whichever is larger.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# Bits after the leading one, and the exponent of the smallest normal number.
_FORMATS = {"F64": (52, -1022), "F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}
_BLOCK_ENTRIES = 2**16  # half a MiB, which stays in the cache
_GRID = 400
_MOST_TERMS = 4096  # rows or columns at once, 13 MB
# The 99 % quantile of the Tracy–Widom law (real case) is 2.02; relative to the edge of σ for a square matrix
# of size s one unit of it is 0.315·s^(−2/3) (Johnstone 2001, Theorem 1.1).
_FLUCTUATION = 2.02 * 0.315
# Real weights are not quite separable: over MiniLM's 36 matrices in bf16 and fp16 the largest value of the
# rounding errors came up to 2 % above the edge of the separable model.
_MARGIN = 1.02
_NORMAL_99 = 2.33


def rounding_edge(stored: Tensor, dtype: str) -> float | None:
    """The edge of the hump that rounding leaves in the singular values of stored − exact.

    Values above it are not rounding alone, with a probability of about 99 %. Where most entries did
    not move at all, the errors follow the update and are no longer independent: look at `unmoved_share`.

    Args:
        stored: the tuned weights, (out, in), in their storage type or upcast.
        dtype: their storage type, "BF16", "F16", "F32" or "F64".

    Returns:
        The edge in the units of σ, or None for a type without a known rounding, an empty matrix, or
        weights that are not finite.

    Example:
        >>> import torch
        >>> edge = rounding_edge(torch.ones(1000, 1000), "BF16")
        >>> round(edge / (2**-7 / 12**0.5 * 2 * 1000**0.5), 2)
        1.03

    Reference: `separable_edge`; uniform rounding errors: Widrow & Kollár 2008, ch. 3.
    """
    if dtype not in _FORMATS or stored.numel() == 0:
        return None
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(stored)):  # a sum would make a float64 copy
        return None
    rows, columns, highest = _variance_sums(stored, dtype)
    edge = separable_edge(rows, columns)
    chance = max(_wobble(stored, dtype, rows, edge), _wobble(stored.T, dtype, columns, edge))
    edge *= (_MARGIN + _FLUCTUATION * min(stored.shape) ** (-2 / 3)) * chance
    return max(edge, _spike(stored, dtype, rows, columns, highest))


def separable_edge(rows: np.ndarray, columns: np.ndarray) -> float:
    r"""The largest singular value of independent entries of mean 0 whose variances have these sums.

    With variances aᵢbⱼ the edge is the least λ(w) over 0 < w < 1/max a, where
    λ = A(w)/u, A(w) = Σ aᵢ/(1 − w aᵢ), B(u) = Σ bⱼ/(1 − u bⱼ) and u solves w·A(w) = u·B(u); σ = √λ.
    For equal variances v this is √v·(√m + √n).

    Args:
        rows: Σⱼ of the variances, (m,).
        columns: Σᵢ of the variances, (n,).

    Example:
        >>> round(separable_edge(np.full(400, 900.0), np.full(900, 400.0)), 2)
        50.0

    Reference: Paul & Silverstein 2009, §3 (separable covariance), in the large-size limit.
    """
    total = rows.sum()
    if not total > 0:
        return 0.0
    a, b = rows / rows.max(), columns / columns.max()
    # Grids that are dense at both ends: the minimum lies near 1 where one row or column dominates.
    t = 0.5 - 0.5 * np.cos(np.pi * (np.arange(1, _GRID) / _GRID))
    sum_a, sum_b = _resolvent(a, t), _resolvent(b, t)
    u = np.exp(np.interp(np.log(t * sum_a), np.log(t * sum_b), np.log(t)))
    reached = t * sum_a <= (t * sum_b)[-1]
    ratio = np.where(reached, sum_a / u, np.inf)
    return math.sqrt(ratio.min() * rows.max() * columns.max() / total)


def _resolvent(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Σ aᵢ/(1 − w aᵢ) for every w."""
    found = np.zeros(len(w))
    for start in range(0, len(a), _MOST_TERMS):
        some = a[start : start + _MOST_TERMS]
        terms = np.multiply.outer(some, -w)  # one array for all steps: fresh memory is what takes the time here
        terms += 1
        np.divide(some[:, None], terms, out=terms)
        found += terms.sum(0)
    return found


def _variance_sums(stored: Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column sums of ulp²/12 and each row's largest ulp², a block of rows at a time."""
    rows, highest = np.empty(stored.shape[0]), np.empty(stored.shape[0])
    columns = np.zeros(stored.shape[1])
    height = max(1, _BLOCK_ENTRIES // stored.shape[1])
    for start in range(0, stored.shape[0], height):
        squared = _squared_ulp(stored[start : start + height], dtype)
        rows[start : start + height] = squared.sum(1).div(12).cpu().numpy()
        highest[start : start + height] = squared.amax(1).cpu().numpy()
        columns += squared.sum(0).div(12).cpu().numpy()
    return rows, columns, highest


def _wobble(stored: Tensor, dtype: str, rows: np.ndarray, edge: float) -> float:
    """How far chance may lift the edge through the norm of the errors in the largest row.

    An error uniform in ±ulp/2 has E e² = ulp²/12 and Var e² = ulp⁴/180. The bulk averages this away;
    it counts as far as the row alone makes the edge.
    """
    top = int(rows.argmax())
    spread = math.sqrt(float(_squared_ulp(stored[top], dtype).square().sum()) / 180)
    alone = (rows[top] / edge**2) ** 2
    return math.sqrt(1 + _NORMAL_99 * alone * spread / rows[top])


def _spike(stored: Tensor, dtype: str, rows: np.ndarray, columns: np.ndarray, highest: np.ndarray) -> float:
    r"""The largest value that the error of one entry, at most θ = ulp/2, makes among the others of its row and column.

    It stands out if θ⁴ > rᵢcⱼ, then as √((θ² + rᵢ)(θ² + cⱼ))/θ (Benaych-Georges & Nadakuditi 2012, §3.1).
    """
    largest = 0.0
    for i in np.flatnonzero(np.square(highest / 4) > rows * columns.min()):
        squared = _squared_ulp(stored[i], dtype).div(4).cpu().numpy()
        out = np.square(squared) > rows[i] * columns
        theta, c = squared[out], columns[out]
        if out.any():
            largest = max(largest, float(((theta + rows[i]) * (theta + c) / theta).max()))
    return math.sqrt(largest)


def _squared_ulp(block: Tensor, dtype: str) -> Tensor:
    """The squared distance between neighbouring numbers of the storage type at each entry, float64.

    Read from and written into the exponent bits of float64: a tenth of the time of frexp and ldexp.
    """
    bits, lowest = _FORMATS[dtype]
    exponent = block.to(torch.float64).contiguous().view(torch.int64) >> 52
    exponent.bitwise_and_(0x7FF).clamp_(min=lowest + 1023)
    exponent.sub_(1023 + bits).mul_(2).add_(1023).clamp_(min=0)
    return exponent.bitwise_left_shift_(52).view(torch.float64)
