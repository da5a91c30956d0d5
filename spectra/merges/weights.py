"""`Weights`: W₀, M and ΔW of one matrix, worked on a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.lazy import torch
from spectra.merges.change import Change

if TYPE_CHECKING:
    from torch import Tensor

_EVIDENCE = 8  # entries
_BLOCK_ENTRIES = 2**17  # of the rows at work at once, 1 MiB in float64: they stay in the cache


@dataclass(frozen=True, eq=False)
class Weights:
    """One matrix of a merge, all (out, in).

    Attributes:
        base: W₀ as stored.
        merged: M as stored.
        change: ΔW.
        kept: the types in which the sum may have been kept before it was stored, the likeliest first.
    """

    base: Tensor
    merged: Tensor
    change: Change
    kept: Sequence[torch.dtype]

    def blocks(self) -> Iterator[slice]:
        """The rows, as many at a time as stay in the cache."""
        return blocks(self.merged)

    def tells(self) -> bool:
        """Whether M is not as good as W₀: entries moved, eight of them or half of those that ΔW changes at all.

        Where rounding drowns ΔW, the few entries that are next to zero may move all the same, and tell nothing of s.
        """
        if equals(self.base, self.merged):
            return False
        moved = changed = 0
        for rows in self.blocks():
            unmoved = self.base[rows].to(self.kept[0]).to(self.merged.dtype)
            moved += int((unmoved != self.merged[rows]).count_nonzero())
            changed += int(self.change.float32(rows).count_nonzero())
            if moved >= _EVIDENCE:
                return True
        return 2 * moved >= changed


def blocks(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix, as many at a time as stay in the cache."""
    height = max(1, _BLOCK_ENTRIES // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], height):
        yield slice(start, min(start + height, matrix.shape[0]))


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one type hold the same: by their bits, eight bytes at a time, or else by their values.

    torch compares 16-bit entries one by one, which takes six times as long.

    Example:
        >>> same(torch.zeros(4), -torch.zeros(4)), same(torch.zeros(3), torch.ones(3))
        (True, False)
    """
    wide = [_words(tensor) for tensor in (first, second)]
    if wide[0] is not None and wide[1] is not None and torch.equal(wide[0], wide[1]):
        return first.shape == second.shape
    return torch.equal(first, second)


def _words(tensor: Tensor) -> Tensor | None:
    """The entries as 64-bit words; None where they do not fill such words."""
    bytes_before = tensor.storage_offset() * tensor.itemsize
    if not tensor.is_contiguous() or tensor.nbytes % 8 or bytes_before % 8:
        return None
    return tensor.flatten().view(torch.int64)


def equals(base: Tensor, merged: Tensor) -> bool:
    """Whether M is W₀, stored in M's type, by way of 16 bits where it went through another type at all."""
    halves = [] if base.dtype == merged.dtype and base.dtype.itemsize == 2 else [torch.bfloat16, torch.float16]
    by_way = dict.fromkeys([merged.dtype, *halves])
    return any(
        all(same(base[rows].to(kept).to(merged.dtype), merged[rows]) for rows in blocks(merged)) for kept in by_way
    )


def kept_in(merged: Tensor) -> list[torch.dtype]:
    """The types in which the sum may have been kept: a narrower one than M's, if M holds nothing else, and M's.

    Example:
        >>> import torch
        >>> kept_in(torch.tensor([[0.5]])), kept_in(torch.tensor([[0.1]]))
        ([torch.bfloat16, torch.float32], [torch.float32])
    """
    types = (torch.bfloat16, torch.float16, torch.float32)
    narrower = [kind for kind in types if kind.itemsize < merged.dtype.itemsize]
    fits = [kind for kind in narrower if all(_holds(kind, merged[rows]) for rows in blocks(merged))]
    return [*fits[:1], merged.dtype]


def _holds(kind: torch.dtype, weight: Tensor) -> bool:
    return same(weight.to(kind).to(weight.dtype), weight)
