"""The forms in which ΔW is read: its entries, or factors that are never multiplied out by the engine.

Nothing here imports torch: planning asks for the class of a form that is not read yet.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

from spectra import text
from spectra.deltas.lengths import frobenius
from spectra.deltas.relatedness import cosine_to_base
from spectra.deltas.thin import times
from spectra.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from spectra.deltas.rounding import Noise

MOVED = (0.0, 1e-6, 1e-5)  # |ΔW| above which an entry counts as moved: at all, and by what papers take as a threshold
SMALL = 2**14  # entries of a matrix of which each call takes more time than the arithmetic
_BLOCK = 512  # rows of a product that are there at once where its norm needs them
_BLOCK_ENTRIES = 2**18  # of a matrix that are looked at at once: 2 MiB, little beside any matrix that is large
_SUM_ERROR = 1e-14  # of (‖L‖‖R‖)⁴: float64, with room for the length of the sums
_CANCELLED = 1e-6  # below this share of (‖L‖‖R‖)², ⟨LᵀL, RRᵀ⟩ has lost more than six of its digits


class Form(ABC):
    """What ΔW (out, in) can do, however it is kept; all tensors are float64.

    The class of a form matters to the ladder of solvers and to the plan alone. A new form is a class here, an entry
    in `spectra.engine.ladder.LADDERS` and one in `spectra.engine.costs.COSTS`.

    Attributes:
        base_norm: ‖W₀‖_F where the base was read, else None.
        base_inner: ⟨W₀, ΔW⟩ where the base was read, else None.
        noise_edge: the largest singular value that storage rounding alone would give at most, or None.
        noise: what it would give by every story of how the weights were stored; the spectrum tells which is true.
        unchanged: the fraction of entries that are equal in both files, or None.

    Example:
        >>> import torch
        >>> form = LowRank(torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[2.0, 0.0]]).double())
        >>> form.shape, form.max_rank, form.norm
        ((2, 2), 1, 10.0)
        >>> form.times(torch.ones(2, 1).double()).tolist(), form.T.times(torch.ones(2, 1).double()).tolist()
        ([[6.0], [8.0]], [[14.0], [0.0]])
        >>> form.rows(1, 2).to_dense().tolist()
        [[8.0, 0.0]]
    """

    base_norm: float | None
    base_inner: float | None
    noise_edge: float | None = None
    noise: tuple[Noise, ...] = ()
    unchanged: float | None = None

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def norm(self) -> float:
        """‖ΔW‖_F, computed without the singular values; not finite if an entry is not."""

    @abstractmethod
    def times(self, block: Tensor) -> Tensor:
        """ΔW · X for a block X (in, k) of few columns."""

    @property
    @abstractmethod
    def T(self) -> Self:  # noqa: N802
        """ΔWᵀ (in, out)."""

    @abstractmethod
    def take(self, rows: slice | Tensor) -> Form:
        """Some rows of ΔW, as a slice or as their numbers; what is known of the base stays that of the whole."""

    @abstractmethod
    def inner(self, matrix: Tensor) -> float:
        """⟨ΔW, M⟩ = Σᵢⱼ ΔWᵢⱼ Mᵢⱼ for a matrix (out, in), without forming a ΔW that is given in factors."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """factor · ΔW."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """ΔW as one tensor (out, in)."""

    @property
    def max_rank(self) -> int:
        """What the rank of ΔW cannot exceed."""
        return min(self.shape)

    @property
    def magnitude(self) -> float:
        """What rounding errors in ΔW are relative to: 0 where it is given exactly, ‖ΔW‖_F or more where it is a sum."""
        return 0.0

    @property
    def fourth_moment(self) -> tuple[float, float] | None:
        """Σσ⁴ = ‖ΔW·ΔWᵀ‖_F² without the singular values, and what it may be off by; None where that is dear."""
        return None

    @property
    def is_zero(self) -> bool:
        """Whether every entry is zero, where the norm is."""
        return self.norm == 0

    @property
    def moved(self) -> tuple[float, ...] | None:
        """The share of entries with |ΔW| above each of `MOVED`; None of factors, which are not multiplied out.

        A product of trained factors has no zeros anyway: what of it moves a stored weight, the merged model can tell.
        """
        return None

    def rows(self, start: int, stop: int) -> Form:
        """Rows start … stop − 1 of ΔW."""
        return self.take(slice(start, stop))

    @property
    def base_cosine(self) -> float | None:
        """cos(W₀ + ΔW, W₀), or None where the base was not read or nothing is left to tell a direction from."""
        if self.base_norm is None or self.base_inner is None:
            return None
        return cosine_to_base(self.base_norm, self.norm, self.base_inner)

    def beside(self, base: Tensor) -> Self:
        """The same ΔW with what W₀ (out, in) says of it: ‖W₀‖_F and ⟨W₀, ΔW⟩."""
        known = {"base_norm": frobenius(base), "base_inner": self.inner(base)}
        return cast("Self", replace(cast("Any", self), **known))


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """ΔW as its entries.

    Attributes:
        matrix: ΔW, float64 (out, in).
        base_norm: ‖W₀‖_F where the base was read, else None.
        base_inner: ⟨W₀, ΔW⟩ where the base was read, else None.
        noise_edge: the largest singular value that storage rounding alone would give at most, or None.
        unchanged: the fraction of entries that are equal in both files, or None.
        noise: what rounding would give by every story of how the weights were stored, the most noise first.
        rounded: an update ↦ what would be left of it, had it been stored as a story tells; it reads W₀ again, or keeps
            it where that lies on a server.
    """

    matrix: Tensor
    base_norm: float | None = None
    noise_edge: float | None = None
    unchanged: float | None = None
    base_inner: float | None = None
    noise: tuple[Noise, ...] = ()
    rounded: Callable[[Noise, Tensor], Tensor] | None = None

    @property
    def tensors(self) -> tuple[Tensor]:
        """The matrix."""
        return (self.matrix,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.matrix.shape[0], self.matrix.shape[1])

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F from the entries."""
        return float(self.matrix.norm())

    @property
    def is_zero(self) -> bool:
        """Whether every entry is zero: a norm of 0 may be squares that underflow."""
        return not bool(self.matrix.any())

    @cached_property
    def moved(self) -> tuple[float, ...] | None:
        """The share of entries with |ΔW| above each of `MOVED`; None of a matrix without entries."""
        if not self.matrix.numel():
            return None
        height = max(1, _BLOCK_ENTRIES // self.shape[1])
        counts = torch.zeros(len(MOVED), dtype=torch.int64, device=self.matrix.device)
        for start in range(0, self.shape[0], height):  # no second matrix of absolute values
            sizes = self.matrix[start : start + height].abs()
            counts += torch.stack([(sizes > least).count_nonzero() for least in MOVED])
        return tuple(count / self.matrix.numel() for count in counts.tolist())

    def times(self, block: Tensor) -> Tensor:
        """ΔW · X for a block X (in, k) of few columns."""
        return times(self.matrix, block)

    @property
    def T(self) -> Dense:  # noqa: N802
        """ΔWᵀ, a view."""
        return replace(self, matrix=self.matrix.mT, rounded=None)

    def take(self, rows: slice | Tensor) -> Dense:
        """Some rows; a slice is a view."""
        return replace(self, matrix=self.matrix[rows], rounded=None, base_inner=None)

    def inner(self, matrix: Tensor) -> float:
        """Over the entries, some rows at a time: W₀ may be a transpose, which a product of all would copy."""
        height = max(1, _BLOCK_ENTRIES // max(1, self.shape[1]))
        blocks = (slice(start, start + height) for start in range(0, self.shape[0], height))
        return sum(float((self.matrix[block] * matrix[block]).sum()) for block in blocks)

    def scaled(self, factor: float) -> Dense:
        """factor · ΔW; storage rounding, if known, grows with it."""
        edge = None if self.noise_edge is None else abs(factor) * self.noise_edge
        noise = tuple(story.scaled(factor) for story in self.noise)
        return replace(self, matrix=factor * self.matrix, noise_edge=edge, noise=noise, rounded=None, base_inner=None)

    def to_dense(self) -> Tensor:
        """The matrix."""
        return self.matrix

    def __repr__(self) -> str:
        return f"Dense({text.size(self.shape)})"


def know_together(forms: Sequence[Dense]) -> None:
    """Find norm and moved entries of several small matrices of one shape at once; each then knows its own.

    Example:
        >>> import torch
        >>> forms = [Dense(scale * torch.ones(1, 4).double()) for scale in (1.0, 0.0)]
        >>> know_together(forms)
        >>> [(form.norm, form.moved) for form in forms]
        [(2.0, (1.0, 1.0, 1.0)), (0.0, (0.0, 0.0, 0.0))]
    """
    stack = torch.stack([form.matrix for form in forms]).flatten(1)
    norms = torch.linalg.vector_norm(stack, dim=1).tolist()
    sizes = stack.abs()
    counts = torch.stack([(sizes > least).sum(1) for least in MOVED], 1).tolist()
    for form, norm, moved in zip(forms, norms, counts, strict=True):
        vars(form).update(norm=norm, moved=tuple(count / stack.shape[1] for count in moved))


@dataclass(frozen=True, eq=False)
class LowRank(Form):
    """ΔW = left · right, never multiplied out by the engine.

    Attributes:
        left: L, float64 (out, r).
        right: R, float64 (r, in).
        base_norm: ‖W₀‖_F where the base was read, else None.
        base_inner: ⟨W₀, ΔW⟩ where the base was read, else None.
    """

    left: Tensor
    right: Tensor
    base_norm: float | None = None
    base_inner: float | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The two factors."""
        return (self.left, self.right)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def max_rank(self) -> int:
        """min(r, out, in)."""
        return min(self.left.shape[1], *self.shape)

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """LᵀL and RRᵀ, (r, r) each: what the norm and CholeskyQR both start from."""
        return self.left.mT @ self.left, self.right @ self.right.mT

    @cached_property
    def norm(self) -> float:
        """‖LR‖_F from the two r×r Gram matrices, ‖LR‖² = ⟨LᵀL, RRᵀ⟩.

        Where the factors nearly cancel, ⟨LᵀL, RRᵀ⟩ keeps too few digits and rows of the product are formed, a block
        at a time.
        """
        gram_left, gram_right = self.grams
        squared = float((gram_left * gram_right).sum())
        if squared < _CANCELLED * self._largest_square:
            blocks = (self.rows(i, i + _BLOCK).to_dense() for i in range(0, self.shape[0], _BLOCK))
            squared = sum(float(block.square().sum()) for block in blocks)
        return math.sqrt(squared)

    @property
    def magnitude(self) -> float:
        """‖L‖_F·‖R‖_F, to which rounding errors in L·R are relative."""
        return math.sqrt(self._largest_square)

    @property
    def fourth_moment(self) -> tuple[float, float]:
        """Σσ⁴ = tr((LᵀL·RRᵀ)²), all of it r×r."""
        gram_left, gram_right = self.grams
        product = gram_left @ gram_right
        return float((product * product.mT).sum()), _SUM_ERROR * self._largest_square * self._largest_square

    @property
    def _largest_square(self) -> float:
        """(‖L‖_F·‖R‖_F)², which ‖LR‖² cannot exceed."""
        gram_left, gram_right = self.grams
        return float(gram_left.trace() * gram_right.trace())

    def times(self, block: Tensor) -> Tensor:
        """L · (R · X)."""
        return times(self.left, times(self.right, block))

    @property
    def T(self) -> LowRank:  # noqa: N802
        """ΔWᵀ = Rᵀ · Lᵀ, views."""
        return replace(self, left=self.right.mT, right=self.left.mT)

    def take(self, rows: slice | Tensor) -> LowRank:
        """Some rows of L; R stays."""
        return replace(self, left=self.left[rows], base_inner=None)

    def inner(self, matrix: Tensor) -> float:
        """Σ (LᵀM) ∘ R."""
        return float(torch.tensordot(self.left.mT @ matrix, self.right, dims=2))

    def scaled(self, factor: float) -> LowRank:
        """(factor · L) · R."""
        return replace(self, left=factor * self.left, base_inner=None)

    def to_dense(self) -> Tensor:
        """ΔW = L · R as one tensor (out, in)."""
        return self.left @ self.right

    def __repr__(self) -> str:
        return f"LowRank({text.size(self.left.shape)} · {text.size(self.right.shape)})"


@dataclass(frozen=True, eq=False)
class Kronecker(Form):
    """ΔW = first ⊗ second, whose singular values are all products of theirs; never multiplied out by the engine.

    Attributes:
        first: A, float64 (m₁, n₁).
        second: B, float64 (m₂, n₂).
        base_norm: ‖W₀‖_F where the base was read, else None.
        base_inner: ⟨W₀, ΔW⟩ where the base was read, else None.
    """

    first: Tensor
    second: Tensor
    base_norm: float | None = None
    base_inner: float | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The two sides."""
        return (self.first, self.second)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) = (m₁m₂, n₁n₂)."""
        (m1, n1), (m2, n2) = self.first.shape, self.second.shape
        return (m1 * m2, n1 * n2)

    @property
    def max_rank(self) -> int:
        """min(m₁, n₁) · min(m₂, n₂)."""
        return min(self.first.shape) * min(self.second.shape)

    @cached_property
    def norm(self) -> float:
        """‖A ⊗ B‖_F = ‖A‖_F·‖B‖_F."""
        return float(self.first.norm() * self.second.norm())

    @property
    def fourth_moment(self) -> tuple[float, float]:
        """Σσ⁴ = ‖AAᵀ‖_F²·‖BBᵀ‖_F²."""
        squares = [float((side @ side.mT).square().sum()) for side in (self.first, self.second)]
        return squares[0] * squares[1], 0.0

    def times(self, block: Tensor) -> Tensor:
        """(A ⊗ B)·X: each column of X is a matrix M, and gives A·M·Bᵀ."""
        columns = block.T.reshape(-1, self.first.shape[1], self.second.shape[1])
        return (self.first @ columns @ self.second.T).flatten(1).T

    @property
    def T(self) -> Kronecker:  # noqa: N802
        """ΔWᵀ = Aᵀ ⊗ Bᵀ, views."""
        return replace(self, first=self.first.mT, second=self.second.mT)

    def take(self, rows: slice | Tensor) -> Dense:
        """Some rows, formed: rows of a product are no product."""
        return Dense(self.to_dense()[rows], self.base_norm)

    def inner(self, matrix: Tensor) -> float:
        """Σᵢⱼ aᵢⱼ ⟨Mᵢⱼ, B⟩ over the blocks of M."""
        (m1, n1), (m2, n2) = self.first.shape, self.second.shape
        blocks = matrix.reshape(m1, m2, n1, n2)
        return float(torch.tensordot(torch.einsum("iajb,ab->ij", blocks, self.second), self.first, dims=2))

    def scaled(self, factor: float) -> Kronecker:
        """(factor · A) ⊗ B."""
        return replace(self, first=factor * self.first, base_inner=None)

    def to_dense(self) -> Tensor:
        """ΔW as one tensor (out, in)."""
        # torch.kron gives the same but refuses some transposes.
        return (self.first[:, None, :, None] * self.second[None, :, None, :]).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Kronecker({text.size(self.first.shape)} ⊗ {text.size(self.second.shape)})"
