r"""The numbers that a tensor's values are drawn from, as its bits show them, not as its file's header says.

A merge in bf16 that was saved as float32 is a float32 file whose values all lie on bf16's grid; codes of eight bits
that were decoded lie on a coarser one still. What rounding left in an update follows the grid, not the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE = 2**18  # entries that are looked at, spread over the rows
_FIRST_LOOK = 2**13  # entries that are enough where they show all bits
_FULL = 0.25  # of them with all bits; of rounded weights half have
_FEWEST = 256  # entries without which nothing is concluded: of 2⁻²⁵⁶ that all of them lie on a coarser grid by chance
_FEWEST_DISTINCT = 16  # values without which a matrix is a pattern, such as ones or signs, rather than rounded
_STRAY = 1e-3  # share of the entries that may lie off the grid
_BOUND = 1e-2  # share of the entries below which the smallest step is a tail and no limit
_RUN, _RUNS = 128, 64  # entries of a row that share a scale in every format; rows that are looked at
_FEW_DIFFERENT = 0.6  # of a run's values
_MANTISSA = 52
_BIAS = 1023
_SMALLEST_NORMAL = 2.0**-1022


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

        Where 2^(2·floor) is below float64's range it is 0 there.
        """
        return self._steps(block).square_()

    def squared_step(self, number: float) -> float:
        """As `squared_steps`, at one number.

        Example:
            >>> GRIDS["BF16"].squared_step(-1.5) == 2.0**-14
            True
        """
        leading = math.ldexp(0.5, math.frexp(number)[1]) if abs(number) >= _SMALLEST_NORMAL else 0.0
        step = max(leading * 2.0**-self.bits, 2.0**self.floor)
        return step * step

    def round(self, matrix: Tensor) -> Tensor:
        """The nearest number of the grid, ties to even, float64."""
        numbers = matrix.to(torch.float64, copy=True).contiguous()
        few = numbers.abs() < 2.0 ** (self.floor + self.bits)
        near_zero = numbers[few] if self.floor > -_BIAS and bool(few.any()) else None
        cut = _MANTISSA - self.bits
        if cut:  # half a unit is added to the bits and what is below the unit cut off: a third of a division's time
            bits = numbers.view(torch.int64)
            odd = (bits >> cut).bitwise_and_(1) if self.bits else 1  # the leading bit itself, which is not stored
            bits.add_(odd).add_(2 ** (cut - 1) - 1).bitwise_and_(-(2**cut))
        if near_zero is not None:
            numbers[few] = near_zero.div_(2.0**self.floor).round_().mul_(2.0**self.floor)
        return numbers

    def _steps(self, block: Tensor) -> Tensor:
        """The distance between neighbouring numbers of the grid at each entry, float64."""
        exponent = block.to(torch.float64, copy=True).contiguous().view(torch.int64)
        power = exponent.bitwise_and_(0x7FF << _MANTISSA).view(torch.float64)
        return power.mul_(2.0**-self.bits).clamp_(min=2.0**self.floor)


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
    return grids_of(stored[None], dtype)[0]


def grids_of(stack: Tensor, dtype: str) -> list[Grid | None]:
    """The same of each matrix of a stack (b, m, n): what the others are has no influence."""
    nominal = GRIDS.get(dtype)
    if nominal is None or stack[0].numel() < _FEWEST:
        return [nominal] * len(stack)
    found: list[Grid | None] = [nominal] * len(stack)
    few = _sample(stack, _FIRST_LOOK)
    unsure = np.flatnonzero(~_show_all_bits(few, nominal))
    if len(unsure):
        left = slice(None) if len(unsure) == len(stack) else unsure  # all of them are not copied
        values = few[left] if stack[0].numel() <= _FIRST_LOOK else _sample(stack[left], _SAMPLE)
        for place, grid in zip(unsure, _coarsest(values, nominal), strict=True):
            found[place] = grid
    return found


def _coarsest(values: np.ndarray, nominal: Grid) -> list[Grid]:
    """The grid of each row of values; the storage type's own for those that are few or a pattern."""
    looked = _Bits.of(values)
    sure = (looked.counts >= _FEWEST) & _are_various(values, looked.valid)
    longest = np.minimum(looked.quantile(looked.lengths, 1 - _STRAY), nominal.bits)
    floors = np.maximum(looked.quantile(looked.smallest, _STRAY), nominal.floor)
    is_tail = looked.share(looked.exponents < (floors + longest)[:, None]) <= _BOUND
    found = [Grid(int(bits), nominal.floor) for bits in longest]
    for i in np.flatnonzero(
        ~is_tail & sure
    ):  # of multiples of one step, the rare large ones have the long significands
        on_step = looked.valid[i] & (looked.smallest[i] >= floors[i])
        found[i] = Grid(min(int(looked.lengths[i][on_step].max()), nominal.bits), int(floors[i]))
    return [grid if is_sure else nominal for grid, is_sure in zip(found, sure, strict=True)]


def _show_all_bits(values: np.ndarray, nominal: Grid) -> np.ndarray:
    """Whether a few thousand entries, a row each, leave no doubt that the grid is the storage type's own.

    A quarter of these entries with full significands are more than a thousandth of all that `grid_of` would look at.
    The step is taken from three thousandths and has to be too small for half of `_BOUND`: of values on a coarser step,
    with as many strays as are allowed, one matrix in a million on the verge of both limits would pass.
    """
    if values.shape[1] < _FIRST_LOOK // 2:
        return np.zeros(len(values), bool)
    looked = _Bits.of(values)
    floors = np.maximum(looked.quantile(looked.smallest, 3 * _STRAY), nominal.floor)
    shows: np.ndarray = (
        (looked.counts >= _FIRST_LOOK // 2)
        & np.isfinite(values).all(1)
        & _are_various(values, looked.valid)
        & (looked.share(looked.lengths >= nominal.bits) >= _FULL)
        & (looked.share(looked.exponents < (floors + nominal.bits)[:, None]) <= _BOUND / 2)
    )
    return shows


@dataclass(frozen=True)
class _Bits:
    """Of rows of numbers: the leading bits' exponents, how many bits after them are used, and the last ones' exponents.

    Attributes:
        valid: which of the numbers are finite and not zero; the others count for nothing.
        counts: how many are, row by row.
    """

    valid: np.ndarray
    counts: np.ndarray
    exponents: np.ndarray
    lengths: np.ndarray
    smallest: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> _Bits:
        """Those of float32 or float64 numbers."""
        single = values.dtype == np.float32
        mantissa, bias = (23, 127) if single else (_MANTISSA, _BIAS)
        integer = np.dtype(np.int32 if single else np.int64)
        pattern: np.ndarray = values.view(integer)
        exponents = pattern >> mantissa  # in place from here on: fresh memory is what takes the time
        exponents &= 2 * bias + 1
        valid = exponents <= 2 * bias
        valid &= values != 0
        exponents -= bias
        significand = pattern & (2**mantissa - 1)
        significand |= 2**mantissa
        significand &= -significand
        lengths = significand.astype(values.dtype).view(integer)
        lengths >>= mantissa
        np.subtract(mantissa + bias, lengths, out=lengths)
        return cls(valid, _counts(valid), exponents, lengths, exponents - lengths)

    def share(self, those: np.ndarray) -> np.ndarray:
        """Of how many of each row it is true."""
        share: np.ndarray = _counts(those & self.valid) / np.maximum(self.counts, 1)
        return share

    def quantile(self, numbers: np.ndarray, share: float) -> np.ndarray:
        """The least number of each row that at least such a share of the row does not exceed; counted, as few differ.

        Of a row without any, whatever.
        """
        least = numbers.min()
        width = int(numbers.max() - least) + 1
        cells = numbers - least
        if len(numbers) > 1:
            cells += (width * np.arange(len(numbers), dtype=cells.dtype))[:, None]
        cells = cells.ravel() if self.valid.all() else cells[self.valid]
        up_to = np.bincount(cells, minlength=width * len(numbers)).reshape(len(numbers), width).cumsum(1)
        places = np.ceil(share * self.counts).clip(1)
        found: np.ndarray = int(least) + (up_to < places[:, None]).sum(1)
        return found


def _counts(those: np.ndarray) -> np.ndarray:
    """Of how many of each row it is true: a row at a time, at a tenth of the sum's time."""
    return np.array([np.count_nonzero(row) for row in those])


def _are_various(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Whether the first of each row have enough different sizes; most weights show it in the very first of them."""
    first = slice(None), slice(4 * _FEWEST_DISTINCT)
    sizes = np.sort(np.abs(np.where(valid[first], values[first], 0)), axis=1)
    various: np.ndarray = (sizes[:, 1:] > sizes[:, :-1]).sum(1) >= _FEWEST_DISTINCT
    for i in np.flatnonzero(~various):
        various[i] = len(np.unique(np.abs(values[i][valid[i]][:4096]))) >= _FEWEST_DISTINCT
    return various


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
    rows = stored[:: max(1, stored.shape[0] // _RUNS), :_RUN]
    rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
    ordered = np.sort(rows.abs().cpu().numpy(), axis=1)
    different = (ordered[:, 1:] > ordered[:, :-1]).sum(1) + (ordered[:, 0] > 0)
    shares = np.sort(different / (ordered > 0).sum(1).clip(min=1))
    few = shares[(len(shares) - 1) // 2] < _FEW_DIFFERENT
    return bool(few and len(np.unique(ordered)) >= _FEWEST_DISTINCT)


def _sample(stack: Tensor, count: int) -> np.ndarray:
    """Entries from all over each matrix, a row each, float32 where that holds all with all their bits, else float64."""
    matrices = stack.reshape(*stack.shape[:2], -1)
    every = max(1, math.ceil(matrices[0].numel() / count))
    along_rows = min(every, max(1, matrices.shape[2] // 32))  # from every row, so that none of them goes unseen
    down = max(1, math.ceil(every / along_rows))
    entries = matrices[:, ::down, ::along_rows]
    if entries.dtype == torch.float64:
        return entries.flatten(1).cpu().numpy()
    values = entries.to(torch.float32).flatten(1).cpu().numpy()
    subnormal = (np.abs(values) < np.finfo(np.float32).tiny) & (values != 0)
    return values.astype(np.float64) if subnormal.any() else values
