"""Recipes: how to form one ΔW from stored tensors, in float64. Frozen, picklable, unread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.sources.tensors import TensorRef
from spectra.types import Dense, Form, LowRank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class InMemory:
    """A matrix, or two factors, that is already here."""

    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, *factors: Tensor) -> InMemory:
        """From one matrix (out, in), or left (out, r) and right (r, in)."""
        import torch

        tensors = tuple(torch.as_tensor(factor) for factor in factors)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"a weight delta needs matrices, not shapes {shapes}")
        if len(shapes) == 2 and shapes[0][1] != shapes[1][0]:
            raise ValueError(f"factors of shapes {shapes[0]} and {shapes[1]} cannot be multiplied")
        return cls(tensors)

    @property
    def factored(self) -> bool:
        """True for two factors."""
        return len(self.factors) == 2

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Nothing is stored."""
        return ()

    def read(self, device: str = "cpu") -> Form:
        """The matrix or the factors in float64."""
        import torch

        tensors = [factor.detach().to(device=device, dtype=torch.float64) for factor in self.factors]
        return LowRank(tensors[0], tensors[1]) if self.factored else Dense(tensors[0])


@dataclass(frozen=True)
class Difference:
    """ΔW = tuned − base, subtracted in float64, in which it is exact."""

    tuned: TensorRef
    base: TensorRef

    @property
    def factored(self) -> bool:
        """False."""
        return False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Both stored weights."""
        return (self.tuned, self.base)

    def read(self, device: str = "cpu") -> Dense:
        """Subtract, and note what the stored weights tell about the difference."""
        from spectra.sources.rounding import rounding_edge

        tuned = self.tuned.read_float64(device)
        base = self.base.read_float64(device)
        delta = tuned - base
        return Dense(
            matrix=delta,
            base_norm=float(base.norm()),
            noise_edge=rounding_edge(tuned, self.tuned.dtype),
            unchanged=float((delta == 0).double().mean()) if delta.numel() else None,
        )


@dataclass(frozen=True)
class Term:
    """scale · diag(row_scale) · (Σ lefts) · right, one summand of a factored update.

    Attributes:
        lefts: (out, r) each; several where heads that share `right` are added up.
        right: (r, in).
        scale: a number, α/r and the like.
        row_scale: (out,) or a single entry, or None.
    """

    lefts: tuple[TensorRef, ...]
    right: TensorRef
    scale: float = 1.0
    row_scale: TensorRef | None = None

    def read(self, device: str) -> tuple[Tensor, Tensor]:
        """The two factors in float64, all scales in the left one."""
        left = self.lefts[0].read_float64(device)
        for ref in self.lefts[1:]:
            left = left + ref.read_float64(device)
        if self.row_scale is not None:
            left = self.row_scale.read_float64(device).reshape(-1, 1) * left
        return self.scale * left, self.right.read_float64(device)


@dataclass(frozen=True)
class Factors:
    """ΔW = Σ terms, as one pair of factors [L₁ | … | L_n] · [R₁; …; R_n]."""

    terms: tuple[Term, ...]
    base: TensorRef | None = None  # only its norm is read

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All stored factors and scales."""
        found: list[TensorRef] = []
        for term in self.terms:
            found += [*term.lefts, term.right]
            found += [term.row_scale] if term.row_scale is not None else []
        return (*found, self.base) if self.base else tuple(found)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.terms[0].lefts[0].shape[0], self.terms[0].right.shape[1])

    @property
    def rank(self) -> int:
        """The sum of the factor widths, at most min(out, in)."""
        return min(sum(term.right.shape[0] for term in self.terms), *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The factors in float64."""
        import torch

        pairs = [term.read(device) for term in self.terms]
        left = pairs[0][0] if len(pairs) == 1 else torch.cat([pair[0] for pair in pairs], 1)
        right = pairs[0][1] if len(pairs) == 1 else torch.cat([pair[1] for pair in pairs], 0)
        return LowRank(left, right, float(self.base.read_float64(device).norm()) if self.base else None)
