"""Codes out of words, and numbers out of codes, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ENTRIES = 2**20  # how much of a weight is decoded at a time


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows of such a width that are decoded at a time."""
    height = max(1, BLOCK_ENTRIES // max(1, width))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes of so many bits that lie one after another along the last axis, from the low bits on.

    Bytes are joined, as few as hold whole codes: the integers are little-endian, so their width does not matter.

    Args:
        words: (…, k) integers whose bytes are a whole number of such groups.
        bits: 1 … 8.

    Returns:
        (…, n) in uint8.

    Example:
        >>> import torch
        >>> unpacked(torch.tensor([[0x76543210]], dtype=torch.int32), 4).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    shared = math.gcd(bits, 8)
    groups = words.contiguous().view(torch.uint8).reshape(*words.shape[:-1], -1, bits // shared)
    joined = groups[..., 0].to(torch.int64)
    for place in range(1, bits // shared):
        joined |= groups[..., place].to(torch.int64) << (8 * place)
    codes = torch.empty((*joined.shape, 8 // shared), dtype=torch.uint8, device=words.device)
    for place in range(8 // shared):
        codes[..., place] = (joined >> (bits * place)) & (2**bits - 1)
    return codes.flatten(-2)


def scaled(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """(codes − zeros)·scales, rounded once to the scales' type, as kernels of that type compute it."""
    return (codes.to(torch.int16) - zeros).to(scales.dtype) * scales


def group_numbers(ref: TensorRef, given: Tensor, groups: int) -> Tensor:
    """The group of each input, as an index.

    Raises:
        SourceError: it names groups that there are no scales for.
    """
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < groups:
        raise SourceError(f"{ref.name} in {ref.path} names groups outside 0 … {groups - 1}; download it again")
    return given.to(torch.int64)
