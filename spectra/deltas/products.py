"""Hadamard and Kronecker products of small factors: the updates of LoHa and LoKr, whoever saved them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense, Kronecker, LowRank
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Product:
    r"""left · right; with a core, the CP form of a convolution, left · (core ×₂ right).

    With a core G (r, s, k, …) and right (s, in) the entry [o, (i, k, …)] is
    Σ_{pq} left[o, p] · G[p, q, k, …] · right[q, i].

    Attributes:
        left: (out, r).
        right: (r, in), or (s, in) under a core.
        core: (r, s, k, …), or None.
    """

    left: TensorRef
    right: TensorRef
    core: TensorRef | None = None

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The stored factors."""
        return (self.left, self.right, self.core) if self.core else (self.left, self.right)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), a convolution's kernel counted with `in`."""
        kernel = math.prod(self.core.shape[2:]) if self.core else 1
        return (self.left.shape[0], self.right.shape[1] * kernel)

    @property
    def width(self) -> int:
        """r, how many columns the left factor has."""
        return self.left.shape[1]

    @property
    def fault(self) -> str:
        """Why the factors cannot be multiplied; "" if they can."""
        shapes = " and ".join(str(list(ref.shape)) for ref in self.refs)
        flat = len(self.left.shape) == 2 and len(self.right.shape) == 2
        inner = (self.left.shape[1:], self.right.shape[:1])
        core = (self.core.shape[:1], self.core.shape[1:2]) if self.core else (self.right.shape[:1], self.left.shape[1:])
        return "" if flat and inner == core else f"factors of shapes {shapes} cannot be multiplied"

    def factors(self, device: str) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in) in float64, the core in the right one."""
        left, right = self.left.read_float64(device), self.right.read_float64(device)
        if self.core is not None:
            core = self.core.read_float64(device).reshape(*self.core.shape[:2], -1)
            right = torch.einsum("pqk,qi->pik", core, right).flatten(1)
        return left, right

    def matrix(self, device: str) -> Tensor:
        """The product (out, in) in float64."""
        left, right = self.factors(device)
        return left @ right


@dataclass(frozen=True)
class HadamardProduct:
    r"""ΔW = scale · (L₁R₁) ∘ (L₂R₂), the entrywise product of two low-rank matrices.

    As factors of width r₁r₂, without forming either matrix: row o of the left one is L₁[o] ⊗ L₂[o], column i
    of the right one is R₁[:, i] ⊗ R₂[:, i] (Khatri–Rao). Where r₁r₂ is not below min(out, in) the product of
    the two matrices is smaller, and is what is formed.

    Reference: Hyeon-Woo et al. 2022 (FedPara); Yeh et al. 2024 (LyCORIS).
    """

    first: Product
    second: Product
    scale: float = 1.0

    @property
    def factored(self) -> bool:
        """Whether factors are smaller than the matrix."""
        return self._width < min(self.shape)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The stored factors of both."""
        return (*self.first.refs, *self.second.refs)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.first.shape

    @property
    def rank(self) -> int:
        """r₁r₂, at most min(out, in)."""
        return min(self._width, *self.shape)

    @property
    def _width(self) -> int:
        return self.first.width * self.second.width

    @property
    def fault(self) -> str:
        """Why there is no such product; "" if there is."""
        if self.first.fault or self.second.fault:
            return self.first.fault or self.second.fault
        first, second = list(self.first.shape), list(self.second.shape)
        return "" if first == second else f"matrices of shapes {first} and {second} have no entrywise product"

    def read(self, device: str = "cpu") -> LowRank | Dense:
        """The Khatri–Rao factors in float64, or the matrix."""
        if not self.factored:
            return Dense(self.scale * self.first.matrix(device) * self.second.matrix(device))
        (left1, right1), (left2, right2) = self.first.factors(device), self.second.factors(device)
        left = (left1[:, :, None] * left2[:, None, :]).flatten(1)
        right = (right1[:, None, :] * right2[None, :, :]).flatten(0, 1)
        return LowRank(self.scale * left, right)


@dataclass(frozen=True)
class KroneckerProduct:
    r"""ΔW = scale · (W₁ ⊗ W₂), each of the two a stored matrix or a product of factors.

    A convolution's kernel is the last part of W₂'s columns, so that the flattened product is the product of the
    flattened.

    Reference: Edalati et al. 2022 (KronA); Yeh et al. 2024 (LyCORIS).
    """

    first: TensorRef | Product
    second: TensorRef | Product
    scale: float = 1.0

    @property
    def factored(self) -> bool:
        """True: the two sides are all that is read."""
        return True

    @property
    def form(self) -> type[Kronecker]:
        """A form of its own, neither entries nor a pair of factors."""
        return Kronecker

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The stored matrices and factors."""
        return tuple(ref for side in (self.first, self.second) for ref in _refs(side))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.first.shape[0] * self.second.shape[0], self.first.shape[1] * self.second.shape[1])

    @property
    def rank(self) -> int:
        """rank(W₁) · rank(W₂) as far as the factors' widths bound them."""
        return _rank(self.first) * _rank(self.second)

    @property
    def fault(self) -> str:
        """Why there is no such product; "" if there is."""
        for side in (self.first, self.second):
            if isinstance(side, Product) and side.fault:
                return side.fault
            if len(side.shape) != 2:
                return f"{list(side.shape)} is not the shape of a matrix"
        return ""

    def read(self, device: str = "cpu") -> Kronecker:
        """The two sides in float64, the scale in the first."""
        return Kronecker(self.scale * _matrix(self.first, device), _matrix(self.second, device))


def _refs(side: TensorRef | Product) -> tuple[TensorRef, ...]:
    return side.refs if isinstance(side, Product) else (side,)


def _rank(side: TensorRef | Product) -> int:
    return min(side.width, *side.shape) if isinstance(side, Product) else min(side.shape)


def _matrix(side: TensorRef | Product, device: str) -> Tensor:
    return side.matrix(device) if isinstance(side, Product) else side.read_float64(device)
