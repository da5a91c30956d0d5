"""How M − W₀ fits s·ΔW: the numbers of a row, and how sure s is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.merges.replays import blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Fit:
    r"""Sums over the entries of E = M − W₀ and D = ΔW.

    Attributes:
        change: ‖D‖².
        overlap: ⟨E, D⟩.
        rest: ‖E − D‖².
        stored: ‖fl(W₀ + D) − (W₀ + D)‖², fl to M's type.

    Example:
        >>> fit = Fit(change=4.0, overlap=8.0, rest=4.0, stored=0.0)
        >>> fit.scale, fit.residual, fit.rounding
        (2.0, 1.0, 0.0)
    """

    change: float
    overlap: float
    rest: float
    stored: float

    @property
    def scale(self) -> float | None:
        """s* = ⟨M − W₀, ΔW⟩/‖ΔW‖²; None where ΔW = 0."""
        return self.overlap / self.change if self.change else None

    @property
    def residual(self) -> float | None:
        """‖M − W₀ − ΔW‖_F/‖ΔW‖_F."""
        return math.sqrt(self.rest / self.change) if self.change else None

    @property
    def rounding(self) -> float | None:
        """What storing W₀ + ΔW in M's type leaves of it, in the same unit."""
        return math.sqrt(self.stored / self.change) if self.change else None


def fit(base: Tensor, merged: Tensor, change: Tensor) -> Fit:
    """Fit M − W₀ to s·ΔW, all (out, in).

    16-bit weights are summed up in float32, whose rounding is nothing beside theirs; others in float64.
    """
    import torch

    narrow = merged.dtype.itemsize == 2 and base.dtype.itemsize == 2 and change.dtype == torch.float32
    work = torch.float32 if narrow else torch.float64
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in blocks(merged):
        D = change[rows].to(work)
        W = base[rows].to(work)
        expected = W + D
        rounding = (expected.to(merged.dtype).to(work) - expected).flatten()
        rest = (merged[rows].to(work) - expected).flatten()
        D = D.flatten()
        sums += torch.stack([D @ D, rest @ D, rest @ rest, rounding @ rounding]).double()
    changed, along, rest, stored = sums.tolist()
    return Fit(changed, along + changed, rest, stored)


def spread(base: Tensor, merged: Tensor, change: Tensor, scale: float) -> float:
    r"""The standard error of s*, whatever the size of the errors in each entry: √Σ((E − s·D)D)²/‖D‖².

    Reference: White 1980 (heteroskedasticity-consistent errors).
    """
    total = norm = 0.0
    for rows in blocks(merged):
        D = change[rows].double()
        rest = merged[rows].double() - base[rows].double() - scale * D
        total += float((rest * D).square().sum())
        norm += float(D.square().sum())
    return math.sqrt(total) / norm if norm else math.inf


def lean(
    base: Tensor, merged: Tensor, change: Tensor, kept: torch.dtype, scale: float = 1.0, *, signed: bool = False
) -> tuple[float, float]:
    """How far M − fl(W₀ + s·ΔW) leans towards ΔW, as a share of ΔW, and the standard error of that.

    Unlike s* this is not drawn to 0 where ΔW is less than a unit in the last place of W₀.

    Args:
        base: W₀ (out, in) as stored.
        merged: M as stored.
        change: ΔW.
        kept: the type in which the sum was kept.
        scale: s.
        signed: whether to keep the sign.
    """
    overlap = norm = squares = 0.0
    for rows in blocks(merged):
        D = change[rows].double()
        off = (merged[rows].double() - (base[rows].double() + scale * D).to(kept).double()) * D
        overlap, squares = overlap + float(off.sum()), squares + float(off.square().sum())
        norm += float(D.square().sum())
    share = overlap / norm if norm else 0.0
    return (share if signed else abs(share)), (math.sqrt(squares) / norm if norm else 0.0)


def cosine(a: Tensor, b: Tensor) -> float:
    """⟨A, B⟩/(‖A‖‖B‖), of two matrices; 1 where one of them is zero."""
    dot = first = second = 0.0
    for rows in blocks(a):
        x, y = a[rows].double().flatten(), b[rows].double().flatten()
        dot, first, second = dot + float(x @ y), first + float(x @ x), second + float(y @ y)
    return dot / math.sqrt(first * second) if first and second else 1.0
