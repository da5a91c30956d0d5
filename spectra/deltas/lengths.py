"""‖W₀‖_F, also where the squares of entries are more, or less, than float64 holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spectra.lazy import torch
from spectra.spectrum import times_power

if TYPE_CHECKING:
    from torch import Tensor

_SAFE = 1e-280, 1e280  # of a sum of squares none of which was lost


def frobenius(matrix: Tensor, squares: float | None = None) -> float:
    """‖matrix‖_F.

    Args:
        matrix: any real one.
        squares: the sum of its entries' squares in float64, where that is known; it counts where it can be trusted.

    Example:
        >>> import torch
        >>> frobenius(torch.tensor([[3.0, 4.0]], dtype=torch.float64) * 2.0**600) / 2.0**600
        5.0
    """
    squares = float(matrix.to(torch.float64).square().sum()) if squares is None else squares
    if _SAFE[0] < squares < _SAFE[1]:
        return math.sqrt(squares)
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    exponent = math.frexp(largest)[1]
    half = -exponent // 2  # in two steps: 2^1074 is more than float64 holds
    scaled = matrix.to(torch.float64) * 2.0**half * 2.0 ** (-exponent - half)
    return times_power(math.sqrt(float(scaled.square().sum())), exponent)
