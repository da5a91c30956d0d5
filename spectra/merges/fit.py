"""How M − W₀ fits s·ΔW: the numbers of a row, and how sure s is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectra.lazy import torch
from spectra.merges.bounds import Arithmetic
from spectra.merges.weights import Weights, same

_SAFE = (1e-20, 1e20)  # squared norms between which float32 neither under- nor overflows


@dataclass(frozen=True)
class Fit:
    r"""Sums over the entries of E = M − W₀ and D = ΔW.

    Attributes:
        change: ‖D‖².
        overlap: ⟨E, D⟩.
        rest: ‖E − D‖².
        stored: ‖fl(W₀ + D) − (W₀ + D)‖², fl to M's type.
        bitwise: whether M = fl(W₀ + D), the sum in float32.

    Example:
        >>> fit = Fit(change=4.0, overlap=8.0, rest=4.0, stored=0.0)
        >>> fit.scale, fit.residual, fit.rounding
        (2.0, 1.0, 0.0)
    """

    change: float
    overlap: float
    rest: float
    stored: float
    bitwise: bool = False

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

    @property
    def is_finite(self) -> bool:
        """Whether W₀, M and ΔW are."""
        return math.isfinite(self.rest) and math.isfinite(self.change)


def fit(weights: Weights) -> Fit:
    """Fit M − W₀ to s·ΔW.

    16-bit weights are summed up in float32, whose rounding is nothing beside theirs; others in float64.
    """
    narrow = weights.merged.dtype.itemsize == 2 and weights.base.dtype.itemsize == 2
    sums = _sums(weights, torch.float32) if narrow else None
    if sums is None or not _SAFE[0] < sums.change < _SAFE[1]:
        sums = _sums(weights, torch.float64)
    return sums


def _sums(weights: Weights, work: torch.dtype) -> Fit:
    total = torch.zeros(4, dtype=torch.float64)
    bitwise = work == torch.float32
    for rows in weights.blocks():
        D = weights.change.float32(rows) if work == torch.float32 else weights.change.double(rows)
        merged, expected = weights.merged[rows], weights.base[rows].to(work, copy=True).add_(D)
        stored = expected.to(merged.dtype)
        equal = same(stored, merged)
        rounding = None if equal else (stored.to(work) - expected).flatten()
        off = expected.sub_(merged).flatten()  # in place, as the sum is: fresh memory takes as long as the work
        rounding = off if rounding is None else rounding
        D, bitwise = D.flatten(), bitwise and equal
        total += torch.stack([D @ D, -(off @ D), off @ off, rounding @ rounding]).double()
    change, along, rest, left = total.tolist()
    return Fit(change, along + change, rest, left, bitwise)


def spread(weights: Weights, scale: float) -> float:
    r"""The standard error of s*, whatever the size of the errors in each entry: √Σ((E − s·D)D)²/‖D‖².

    Reference: White 1980 (heteroskedasticity-consistent errors).
    """
    total = norm = 0.0
    for rows in weights.blocks():
        D = weights.change.float32(rows).double()
        rest = weights.merged[rows].double() - weights.base[rows].double() - scale * D
        total += float((rest * D).square().sum())
        norm += float(D.square().sum())
    return math.sqrt(total) / norm if norm else math.inf


def lean(weights: Weights, how: Arithmetic, scale: float = 1.0) -> tuple[float, float]:
    """How far M − fl(W₀ + s·ΔW) leans towards ΔW, as a share of ΔW, and the standard error of that.

    Unlike s* this is not drawn to 0 where ΔW is less than a unit in the last place of W₀.

    Args:
        weights: the matrix.
        how: in which types W₀ and the sum were kept.
        scale: s.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for rows in weights.blocks():
        D = weights.change.float32(rows).double()
        expected = (how.before(weights.base[rows]) + scale * D).to(how.kept).double()
        off, D = ((weights.merged[rows].double() - expected) * D).flatten(), D.square().flatten()
        sums += torch.stack([off.sum(), D.sum(), off @ off, off @ D, D @ D])
    overlap, norm, squares, mixed, fourth = sums.tolist()
    if not norm:
        return 0.0, 0.0
    leaning = overlap / norm
    # Of what is left beside the lean: the lean itself would hide itself where entries are few.
    rest = squares - 2 * leaning * mixed + leaning**2 * fourth
    return leaning, math.sqrt(max(rest, 0.0)) / norm


def similarity(weights: Weights, *, of_update: bool = False) -> float:
    """The cosine of M and W₀, or `of_update` that of M − ΔW and W₀; 1 where one of them is zero."""
    dot = first = second = 0.0
    for rows in weights.blocks():
        x, y = weights.merged[rows].double(), weights.base[rows].double()
        if of_update:
            x = x - weights.change.float32(rows)
        dot += float((x * y).sum())
        first, second = first + float(x.square().sum()), second + float(y.square().sum())
    return dot / math.sqrt(first * second) if first and second else 1.0
