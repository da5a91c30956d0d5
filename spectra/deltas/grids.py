r"""The numbers that a tensor's values are drawn from, as its bits show them, not as its file's header says.

A merge in bf16 that was saved as float32 is a float32 file whose values all lie on bf16's grid; codes of eight bits
that were decoded lie on a coarser one still. What rounding left in an update follows the grid, not the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.lazy import numpy as np
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE = 2**18  # entries that are looked at, spread over the rows
_FEWEST = 256  # entries without which nothing is concluded: of 2⁻²⁵⁶ that all of them lie on a coarser grid by chance
_FEWEST_DISTINCT = 16  # values without which a matrix is a pattern, such as ones or signs, rather than rounded
_STRAY = 1e-3  # share of the entries that may lie off the grid
_BOUND = 1e-2  # share of the entries below which the smallest step is a tail and no limit
_RUN, _RUNS = 128, 64  # entries of a row that share a scale in every format; rows that are looked at
_FEW_DIFFERENT = 0.6  # of a run's values
_MANTISSA = 52
_BIAS = 1023


@dataclass(frozen=True)
class Grid:
    """All s·2^floor and all numbers with so many bits after the leading one.

    Attributes:
        bits: of the significand after the leading one.
        floor: the exponent of the smallest step; numbers near zero are its multiples.

    Example:
        >>> GRIDS["BF16"].name, Grid(3, -9).name, Grid(5, -133).name
        ('bf16', 'e4m3', '6-bit')
    """

    bits: int
    floor: int

    @property
    def name(self) -> str:
        """What the grid is called: the type that it is all or nearly all of, or its number of significant bits."""
        steps = _FLOORS.get(self.bits)
        fits = steps is not None and (self.floor >= steps[0] or self.floor <= UNLIMITED)
        return steps[1] if steps is not None and fits else f"{self.bits + 1}-bit"

    def squared_steps(self, block: Tensor) -> Tensor:
        """The squared distance between neighbouring numbers of the grid at each entry, float64.

        Read from and written into the exponent bits of float64: a tenth of the time of frexp and ldexp.
        """
        exponent = block.to(torch.float64).contiguous().view(torch.int64) >> _MANTISSA
        exponent.bitwise_and_(0x7FF).sub_(_BIAS + self.bits).clamp_(min=self.floor)
        exponent.mul_(2).add_(_BIAS).clamp_(min=0)
        return exponent.bitwise_left_shift_(_MANTISSA).view(torch.float64)

    def round(self, matrix: Tensor) -> Tensor:
        """The nearest number of the grid, ties to even, float64."""
        step = self.squared_steps(matrix).sqrt_()
        return torch.where(step > 0, (matrix / step).round_().mul_(step), matrix)


# Storage types: bits after the leading one, and the exponent of the smallest subnormal number.
GRIDS = {
    "F64": Grid(52, -1074),
    "F32": Grid(23, -149),
    "F16": Grid(10, -24),
    "BF16": Grid(7, -133),
    "F8_E4M3": Grid(3, -9),
    "F8_E5M2": Grid(2, -16),
}
_NAMES = {"F64": "f64", "F32": "f32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_FLOORS = {grid.bits: (grid.floor, _NAMES[dtype]) for dtype, grid in GRIDS.items()}
UNLIMITED = -100  # a floor so low that it is the file's


def grid_of(stored: Tensor, dtype: str) -> Grid | None:
    r"""The coarsest grid that the values lie on, all but a thousandth of them.

    Of values that are rounded to p bits after the leading one, half use all p of them, so the longest significand
    among some hundreds shows p; that of numbers near zero shows the smallest step. Where the entries are too few, or
    a pattern of few values, it is the storage type's own.

    Args:
        stored: the weights, in their storage type or upcast.
        dtype: their storage type, in safetensors' words.

    Returns:
        The grid, never finer than the storage type's; None for a type whose rounding is not known.

    Example:
        >>> import torch
        >>> values = torch.linspace(0.5, 2, 1000)
        >>> grid_of(values[None], "F32").name, grid_of(values[None].bfloat16().float(), "F32").name
        ('f32', 'bf16')
    """
    nominal = GRIDS.get(dtype)
    if nominal is None or stored.numel() < _FEWEST:
        return nominal
    values = _sample(stored).cpu().numpy()  # whole numbers from here on, of which numpy makes less ado
    values = values[np.isfinite(values) & (values != 0)]
    if len(values) < _FEWEST or not _are_various(values):
        return nominal
    pattern = values.view(np.int64)
    exponents = ((pattern >> _MANTISSA) & 0x7FF) - _BIAS
    significand = (pattern & (2**_MANTISSA - 1)) | 2**_MANTISSA
    lowest = (significand & -significand).astype(np.float64).view(np.int64) >> _MANTISSA
    lengths = _MANTISSA - (lowest - _BIAS)
    bits = min(_quantile(lengths, 1 - _STRAY), nominal.bits)
    steps = exponents - lengths
    floor = max(_quantile(steps, _STRAY), nominal.floor)
    if np.count_nonzero(exponents < floor + bits) / len(values) <= _BOUND:
        return Grid(bits, nominal.floor)
    # Of multiples of one step, the rare large ones have the long significands.
    return Grid(min(int(lengths[steps >= floor].max()), nominal.bits), floor)


def _are_various(values: np.ndarray) -> bool:
    """Whether they have enough different sizes; most weights show it in the first few of them."""
    few = np.abs(values[: 4 * _FEWEST_DISTINCT]).tolist()
    return len(set(few)) >= _FEWEST_DISTINCT or len(np.unique(np.abs(values[:4096]))) >= _FEWEST_DISTINCT


def is_coded(stored: Tensor, grid: Grid) -> bool:
    """Whether the values are codes of eight bits or fewer times scales: a run of a row holds few different ones.

    Scales that are no powers of two leave no short significands, so such values look as fine as their type. Of 128
    neighbours that were rounded to bf16 some 110 are different, of e4m3 codes 40, of int8 ones 60.

    Example:
        >>> weights = torch.linspace(-1, 1, 64 * 256).reshape(256, 64).T
        >>> codes = (weights / 0.3).to(torch.float8_e4m3fn)
        >>> is_coded(weights, GRIDS["F32"]), is_coded(codes.float() * 0.3, GRIDS["F32"])
        (False, True)
    """
    if grid.bits < GRIDS["BF16"].bits or stored.ndim != 2 or stored.shape[1] < _RUN:
        return False
    rows = stored[:: max(1, stored.shape[0] // _RUNS), :_RUN].to(torch.float64).abs()
    if len(torch.unique(rows)) < _FEWEST_DISTINCT:
        return False
    ordered = rows.sort(dim=1).values
    different = (ordered.diff(dim=1) > 0).sum(1) + (ordered[:, 0] > 0)
    share = different / (rows > 0).sum(1).clamp(min=1)
    return bool(share.median() < _FEW_DIFFERENT)


def _sample(stored: Tensor) -> Tensor:
    """Entries from all over the matrix, float64."""
    matrix = stored.reshape(stored.shape[0], -1)
    every = max(1, math.ceil(matrix.numel() / _SAMPLE))
    if every == 1:
        return matrix.to(torch.float64).flatten()
    along_rows = min(every, max(1, matrix.shape[1] // 32))  # from every row, so that none of them goes unseen
    down = max(1, math.ceil(every / along_rows))
    return matrix[::down, ::along_rows].to(torch.float64).flatten()


def _quantile(numbers: np.ndarray, share: float) -> int:
    """The least number that at least such a share of them does not exceed; counted, since few are different."""
    place = min(max(math.ceil(share * len(numbers)), 1), len(numbers))
    least = int(numbers.min())
    return least + int(np.bincount(numbers - least).cumsum().searchsorted(place))
