"""Exact SVD of a factored update from its factors; the product is never formed."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

_BLOCK = 512
_CANCELLED = 1e-6  # below this share of (‖L‖‖R‖)², ⟨LᵀL, RRᵀ⟩ has lost more than six of its digits


def factored_svd(
    left: Float64[Tensor, "*batch m r"], right: Float64[Tensor, "*batch r n"], top: int = 0
) -> tuple[Float64[Tensor, "*batch s"], Float64[Tensor, "*batch m k"] | None, Float64[Tensor, "*batch k n"] | None]:
    r"""Singular values of L·R, and its top singular vectors.

    L = Q_L T_L, Rᵀ = Q_R T_R; the SVD of the core T_L T_Rᵀ = U Σ Vᵀ gives L·R = (Q_L U) Σ (Q_R V)ᵀ.

    Args:
        left: L.
        right: R.
        top: how many vectors to return; 0 for none.

    Returns:
        S descending, s = min(m, r, n); U and Vh with k = min(top, s) vectors, or None.

    Example:
        >>> L, R = torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[2.0, 0.0]]).double()
        >>> factored_svd(L, R)[0].tolist()
        [10.0]

    Reference: Golub & Van Loan 2013, §5.2 and §8.6 (SVD after QR).
    """
    reflectors_left, t_left = _householder(left)
    reflectors_right, t_right = _householder(right.mT)
    core = t_left @ t_right.mT
    if top == 0:
        return torch.linalg.svdvals(core), None, None
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    k = min(top, s.shape[-1])
    return s, _rotate(reflectors_left, u[..., :k]), _rotate(reflectors_right, vh[..., :k, :].mT).mT


def _householder(matrix: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A QR decomposition with Q as its reflectors, which costs a third less than forming Q; and the triangle."""
    packed, tau = torch.geqrf(matrix)
    return (packed, tau), packed[..., : tau.shape[-1], :].triu()


def _rotate(reflectors: tuple[Tensor, Tensor], block: Tensor) -> Tensor:
    """Q · block for a block of as many rows as Q has columns."""
    packed, tau = reflectors
    padded = block.new_zeros((*block.shape[:-2], packed.shape[-2], block.shape[-1]))
    padded[..., : block.shape[-2], :] = block
    return torch.ormqr(packed[..., : tau.shape[-1]], tau, padded)


def factored_norm(left: Float64[Tensor, "m r"], right: Float64[Tensor, "r n"]) -> tuple[float, float]:
    """‖L·R‖_F from the two r×r Gram matrices, ‖LR‖² = ⟨LᵀL, RRᵀ⟩; and ‖L‖_F·‖R‖_F.

    Rounding errors in L·R are relative to the second number, not to the first. Where the factors nearly
    cancel, ⟨LᵀL, RRᵀ⟩ keeps too few digits and rows of the product are formed, a block at a time.

    Example:
        >>> factored_norm(torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[2.0, 0.0]]).double())
        (10.0, 10.0)
    """
    gram_left, gram_right = left.T @ left, right @ right.T
    squared = float((gram_left * gram_right).sum())
    most = float(gram_left.trace() * gram_right.trace())
    if squared < _CANCELLED * most:
        starts = range(0, left.shape[0], _BLOCK)
        squared = sum(float((left[i : i + _BLOCK] @ right).square().sum()) for i in starts)
    return math.sqrt(squared), math.sqrt(most)
