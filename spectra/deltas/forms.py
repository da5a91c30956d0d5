"""The forms in which ΔW is read: its entries, or factors that are never multiplied out by the engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from spectra import text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """ΔW as its entries.

    Attributes:
        matrix: ΔW, float64 (out, in).
        base_norm: ‖W₀‖_F where the base was read, else None.
        noise_edge: the largest singular value that storage rounding alone would give, or None.
        unchanged: the fraction of entries that are equal in both files, or None.
    """

    matrix: Tensor
    base_norm: float | None = None
    noise_edge: float | None = None
    unchanged: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.matrix.shape[0], self.matrix.shape[1])

    def to_dense(self) -> Tensor:
        """ΔW as one tensor (out, in)."""
        return self.matrix

    def __repr__(self) -> str:
        return f"Dense({text.size(self.shape)})"


@dataclass(frozen=True)
class LowRank:
    """ΔW = left · right, never multiplied out by the engine.

    Attributes:
        left: float64 (out, r).
        right: float64 (r, in).
        base_norm: ‖W₀‖_F where the base was read, else None.
    """

    left: Tensor
    right: Tensor
    base_norm: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.left.shape[0], self.right.shape[1])

    def to_dense(self) -> Tensor:
        """ΔW = left · right as one tensor (out, in)."""
        return self.left @ self.right

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """leftᵀ·left and right·rightᵀ, (r, r) each: what the norm and CholeskyQR both start from."""
        return self.left.mT @ self.left, self.right @ self.right.mT

    def __repr__(self) -> str:
        return f"LowRank({text.size(self.left.shape)} · {text.size(self.right.shape)})"


@dataclass(frozen=True)
class Kronecker:
    """ΔW = first ⊗ second, whose singular values are all products of theirs; never multiplied out by the engine.

    Attributes:
        first: float64 (m₁, n₁).
        second: float64 (m₂, n₂).
        base_norm: ‖W₀‖_F where the base was read, else None.
    """

    first: Tensor
    second: Tensor
    base_norm: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) = (m₁m₂, n₁n₂)."""
        (m1, n1), (m2, n2) = self.first.shape, self.second.shape
        return (m1 * m2, n1 * n2)

    def to_dense(self) -> Tensor:
        """ΔW as one tensor (out, in)."""
        import torch

        return torch.kron(self.first, self.second)

    def __repr__(self) -> str:
        return f"Kronecker({text.size(self.first.shape)} ⊗ {text.size(self.second.shape)})"


Form = Dense | LowRank | Kronecker
