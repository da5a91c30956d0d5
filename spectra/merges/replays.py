"""The orders of operations in which trainers and mergers form W₀ + ΔW, each done again bit for bit.

A merged weight tells which one it was: the sums differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.lazy import torch
from spectra.merges.change import Change
from spectra.merges.weights import Weights, same
from spectra.sources.formats.dora import Dora

if TYPE_CHECKING:
    from torch import Tensor

SUM = "ΔW in float32, sum in float32, cast (PEFT, mergekit)"


def _sum(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    return (_wide(base) + change.float32(rows)).to(kept)


def _base_cast(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    return (_wide(base.to(kept)) + change.on(kept, rows)).to(kept)


def _update_cast(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    return base.to(kept) + change.float32(rows).to(kept)


def _adapter_cast(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    (half,) = change.halves
    return (_wide(base) + change.float32(rows).to(half)).to(kept)


def _scaled_first(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    return (_wide(base) + change.scaled_first(rows)).to(kept)


def _fused(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    left, right, s = change.factors(_wide(base).dtype)
    return _wide(base).addmm(left[rows], right, alpha=s).to(kept)


def _stepwise(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    return base.to(kept) + change.stepwise(kept, rows)


def _double(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    return (base.double() + change.double(rows)).to(kept)


def _dora(base: Tensor, change: Change, rows: slice, kept: torch.dtype) -> Tensor:
    """m/‖W + V‖ · (W + V), V = s·B·A, with a magnitude per row."""
    assert isinstance(change.recipe, Dora)
    moved = _wide(base.to(kept)) + change.direction(rows)
    magnitude = change.recipe.magnitude.read_real().to(moved.dtype).reshape(-1)[rows]
    return ((magnitude / moved.norm(dim=1))[:, None] * moved).to(kept)


def _wide(base: Tensor) -> Tensor:
    """W₀ in float32, or in float64 if it is stored so."""
    return base.to(torch.promote_types(base.dtype, torch.float32))


def _always(change: Change, kept: torch.dtype) -> bool:
    return True


def _has_term(change: Change, kept: torch.dtype) -> bool:
    return change.term is not None


def _in_half(change: Change, kept: torch.dtype) -> bool:
    return kept.itemsize == 2 and change.term is not None


def _from_half(change: Change, kept: torch.dtype) -> bool:
    return len(change.halves) == 1


def _is_dora(change: Change, kept: torch.dtype) -> bool:
    return isinstance(change.recipe, Dora) and change.recipe.axis == "rows"


@dataclass(frozen=True)
class Replay:
    """One order of operations.

    Attributes:
        name: what it does, and who does it so.
        merged: rows of W₀ as stored, ΔW, which rows, the type in which the sum is kept → rows of M.
        fits: whether there is such an order for a ΔW and a type.
    """

    name: str
    merged: Callable[[Tensor, Change, slice, torch.dtype], Tensor]
    fits: Callable[[Change, torch.dtype], bool] = _always


# The likeliest first: a replay that fails ends with the first rows that it gets wrong.
REPLAYS = (
    Replay(SUM, _sum),
    Replay("W₀ cast, ΔW in float32, sum in float32, cast (PEFT on a model loaded in M's type)", _base_cast),
    Replay("ΔW cast to M's type, then the sum (PEFT's safe_merge)", _update_cast),
    Replay("ΔW cast to the adapter's type, sum in float32, cast (PEFT, 16-bit adapter)", _adapter_cast, _from_half),
    Replay("DoRA in float32, cast (PEFT)", _dora, _is_dora),
    Replay("every step in M's type (kohya, PEFT on a GPU)", _stepwise, _in_half),
    Replay("B scaled first, sum in float32, cast", _scaled_first, _has_term),
    Replay("W₀ + s·B·A as one float32 product (addmm)", _fused, _has_term),
    Replay("everything in float64, cast", _double),
)


def replay_of(weights: Weights) -> str:
    """The name of the order of operations that gives M bit for bit; "" if none does."""
    for kept in weights.kept:
        for replay in REPLAYS:
            if replay.fits(weights.change, kept) and _gives(replay, weights, kept):
                return replay.name
    return ""


def _gives(replay: Replay, weights: Weights, kept: torch.dtype) -> bool:
    base, merged = weights.base, weights.merged
    return all(
        same(replay.merged(base[rows], weights.change, rows, kept).to(merged.dtype), merged[rows])
        for rows in weights.blocks()
    )
