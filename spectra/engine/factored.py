"""Exact SVD of a factored update from its factors; the product is never formed."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

_BLOCK = 512
_CANCELLED = 1e-6  # below this share of (‖L‖‖R‖)², ⟨LᵀL, RRᵀ⟩ has lost more than six of its digits


def factored_svd(
    left: Float64[Tensor, "m r"], right: Float64[Tensor, "r n"], top: int = 0
) -> tuple[Float64[Tensor, " s"], Float64[Tensor, "m k"] | None, Float64[Tensor, "k n"] | None]:
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
    q_left, t_left = torch.linalg.qr(left)
    q_right, t_right = torch.linalg.qr(right.T)
    core = t_left @ t_right.T
    count = min(core.shape)
    if top == 0:
        return torch.linalg.svdvals(core)[:count], None, None
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    k = min(top, count)
    return s, q_left @ u[:, :k], vh[:k] @ q_right.T


def factored_norm(left: Float64[Tensor, "m r"], right: Float64[Tensor, "r n"]) -> float:
    """‖L·R‖_F, from the two r×r Gram matrices: ‖LR‖² = ⟨LᵀL, RRᵀ⟩.

    Where the factors nearly cancel, that sum keeps too few digits and rows of the product are
    formed, a block at a time.

    Example:
        >>> factored_norm(torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[2.0, 0.0]]).double())
        10.0
    """
    squared = float(((left.T @ left) * (right @ right.T)).sum())
    if squared < _CANCELLED * magnitude(left, right) ** 2:
        starts = range(0, left.shape[0], _BLOCK)
        squared = sum(float((left[i : i + _BLOCK] @ right).square().sum()) for i in starts)
    return math.sqrt(squared)


def magnitude(left: Float64[Tensor, "m r"], right: Float64[Tensor, "r n"]) -> float:
    """‖L‖_F·‖R‖_F: rounding errors in L·R are relative to this, not to ‖L·R‖."""
    return float(left.norm() * right.norm())
