"""The orders of operations in which trainers and mergers form W₀ + ΔW, each done again bit for bit.

A merged weight tells which one it was: the sums differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.merges.change import Change, factors
from spectra.sources.formats.dora import Dora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK_ENTRIES = 2**18  # of the rows at work at once, 1 MiB in float32: they stay in the cache


def blocks(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix, as many at a time as stay in the cache."""
    height = max(1, _BLOCK_ENTRIES // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], height):
        yield slice(start, min(start + height, matrix.shape[0]))


def _sum(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    return (_wide(base) + change.float32()[rows]).to(dtype)


def _base_cast(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    return (_wide(base.to(dtype)) + change.on(dtype)[rows]).to(dtype)


def _update_cast(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    return base.to(dtype) + change.float32()[rows].to(dtype)


def _adapter_cast(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    (half,) = change.halves
    return (_wide(base) + change.float32()[rows].to(half)).to(dtype)


def _scaled_first(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    return (_wide(base) + change.scaled_first()[rows]).to(dtype)


def _fused(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    assert change.term is not None
    left, right, s = factors(change.term, _wide(base).dtype)
    return _wide(base).addmm(left[rows], right, alpha=s).to(dtype)


def _stepwise(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    return base.to(dtype) + change.stepwise(dtype)[rows]


def _double(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    return (base.double() + change.double()[rows]).to(dtype)


def _dora(base: Tensor, change: Change, rows: slice, dtype: torch.dtype) -> Tensor:
    """m/‖W + V‖ · (W + V), V = s·B·A, with a magnitude per row."""
    assert isinstance(change.recipe, Dora)
    moved = _wide(base.to(dtype)) + change.direction()[rows]
    magnitude = change.recipe.magnitude.read_real().to(moved.dtype).reshape(-1)[rows]
    return ((magnitude / moved.norm(dim=1))[:, None] * moved).to(dtype)


def _wide(base: Tensor) -> Tensor:
    """W₀ in float32, or in float64 if it is stored so."""
    import torch

    return base.to(torch.promote_types(base.dtype, torch.float32))


def _always(change: Change, dtype: torch.dtype) -> bool:
    return True


def _has_term(change: Change, dtype: torch.dtype) -> bool:
    return change.term is not None


def _in_half(change: Change, dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 and change.term is not None


def _from_half(change: Change, dtype: torch.dtype) -> bool:
    return len(change.halves) == 1


def _is_dora(change: Change, dtype: torch.dtype) -> bool:
    return isinstance(change.recipe, Dora) and change.recipe.axis == "rows"


@dataclass(frozen=True)
class Replay:
    """One order of operations.

    Attributes:
        name: what it does, and who does it so.
        merged: rows of W₀ as stored, ΔW, which rows, the type in which the result is kept → rows of M.
        fits: whether there is such an order for a ΔW and a type.
    """

    name: str
    merged: Callable[[Tensor, Change, slice, torch.dtype], Tensor]
    fits: Callable[[Change, torch.dtype], bool] = _always


# The likeliest first: a replay that fails ends with the first rows that it gets wrong.
REPLAYS = (
    Replay("ΔW in float32, sum in float32, cast (PEFT, mergekit)", _sum),
    Replay("W₀ cast, ΔW in float32, sum in float32, cast (PEFT on a model loaded in M's type)", _base_cast),
    Replay("ΔW cast to M's type, then the sum (PEFT's safe_merge)", _update_cast),
    Replay(
        "ΔW cast to the adapter's type, sum in float32, cast (PEFT, adapter kept in 16 bits)", _adapter_cast, _from_half
    ),
    Replay("DoRA in float32, cast (PEFT)", _dora, _is_dora),
    Replay("every step in M's type (kohya, PEFT on a GPU)", _stepwise, _in_half),
    Replay("B scaled first, sum in float32, cast", _scaled_first, _has_term),
    Replay("W₀ + s·B·A as one float32 product (addmm)", _fused, _has_term),
    Replay("everything in float64, cast", _double),
)


def replay_of(base: Tensor, merged: Tensor, change: Change, dtypes: Sequence[torch.dtype]) -> str:
    """The name of the order of operations that gives M bit for bit; "" if none does.

    Args:
        base: W₀ (out, in) as stored.
        merged: M (out, in) as stored.
        change: ΔW.
        dtypes: the types in which the sum may have been kept before it was stored.
    """
    for dtype in dtypes:
        for replay in REPLAYS:
            if replay.fits(change, dtype) and _gives(replay, base, merged, change, dtype):
                return replay.name
    return ""


def _gives(replay: Replay, base: Tensor, merged: Tensor, change: Change, dtype: torch.dtype) -> bool:
    import torch

    return all(
        torch.equal(replay.merged(base[rows], change, rows, dtype).to(merged.dtype), merged[rows])
        for rows in blocks(merged)
    )
