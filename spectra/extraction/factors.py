"""Balanced factors of a truncated ΔW, and what storing them in fewer bits costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spectra.errors import SelectionError
from spectra.lazy import torch
from spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """ΔW_r = B·A as it is stored.

    Attributes:
        B: (out, r).
        A: (r, in).
        rounding: ‖B·A as stored − B·A‖_F, absolute.
    """

    B: Tensor
    A: Tensor
    rounding: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.A.shape[0])


def balanced(spectrum: Spectrum, rank: int, dtype: str = "float32") -> Factors:
    r"""B = U√Σ and A = √Σ Vᵀ of the top triplets, which have equal norms: neither factor rounds worse than the other.

    Args:
        spectrum: an update with its vectors; where it has fewer than asked for, the rest of the factors is zero.
        rank: r.
        dtype: what the factors are stored in.

    Raises:
        SelectionError: the factors overflow in the dtype.

    Example:
        >>> factors = balanced(Spectrum("a", (2, 2), S=[4.0, 1.0], U=np.eye(2), Vh=np.eye(2)), 1)
        >>> factors.B.tolist(), factors.A.tolist(), factors.rounding
        ([[2.0], [0.0]], [[2.0, 0.0]], 0.0)
    """
    out, inside = spectrum.shape
    B, A = (torch.zeros(shape, dtype=torch.float64) for shape in ((out, rank), (rank, inside)))
    if spectrum.U is not None and spectrum.Vh is not None:
        kept = min(rank, spectrum.rank, spectrum.k)
        root = np.sqrt(spectrum.S[:kept])
        B[:, :kept] = torch.from_numpy(spectrum.U[:, :kept] * root)
        A[:kept] = torch.from_numpy(root[:, None] * spectrum.Vh[:kept])
    stored = B.to(getattr(torch, dtype)), A.to(getattr(torch, dtype))
    if not all(bool(factor.isfinite().all()) for factor in stored):
        raise SelectionError(f"the factors of {spectrum.name} overflow in {dtype}: {_wider(dtype)}")
    return Factors(*stored, _rounding(B, A, *stored))


def _wider(dtype: str) -> str:
    if torch.finfo(getattr(torch, dtype)).max < torch.finfo(torch.bfloat16).max:
        return "store them in bfloat16 or float32"
    return "no type that an adapter is stored in holds values of this size; leave the matrix out (--layer)"


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread for a while: the others are at the next matrices, and would only be waited for.

    Of a rank-64 adapter of 224 modules that was cut to 16, two threads made it twice as slow.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rounding(B: Tensor, A: Tensor, stored_b: Tensor, stored_a: Tensor) -> float:
    r"""‖B̃Ã − BA‖_F = ‖δB·Ã + B·δA‖_F with δB = B̃ − B, δA = Ã − A, from r×r products: nothing cancels."""
    new_a = stored_a.double()
    change_b, change_a = stored_b.double() - B, new_a - A
    left, right = change_b.mT @ change_b, change_a @ change_a.mT
    squares = (left * (new_a @ new_a.mT)).sum() + (right * (B.mT @ B)).sum()
    crossed = ((change_b.mT @ B) * (new_a @ change_a.mT)).sum()
    return math.sqrt(max(0.0, float(squares + 2 * crossed)))
