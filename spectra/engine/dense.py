"""Singular values and top vectors of a dense update, through its float64 Gram matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

_BLOCK = 512
# A value of σ² from the Gram matrix is off by about ε·σ₁², so σ below √ε·σ₁ drowns; measured 2e-8·σ₁.
GRAM_RESOLUTION = 1e-7
SVD_RESOLUTION = 1e-13


def gram(matrix: Float64[Tensor, "m n"]) -> Float64[Tensor, "s s"]:
    """A·Aᵀ or Aᵀ·A, whichever is smaller, s = min(m, n); only the upper triangle is computed, then mirrored.

    Example:
        >>> gram(torch.tensor([[3.0, 4.0]]).double()).tolist()
        [[25.0]]
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    size = wide.shape[0]
    product = torch.empty((size, size), dtype=torch.float64, device=matrix.device)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        torch.mm(wide[start:stop], wide[start:].T, out=product[start:stop, start:])
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


def gram_values(matrix: Float64[Tensor, "m n"]) -> Float64[Tensor, " s"]:
    r"""All singular values, descending: σ = √λ of the float64 Gram matrix.

    Absolute error about 2e-8·σ₁ at worst; values below 1e-7·σ₁ are not resolved (GRAM_RESOLUTION).

    Example:
        >>> gram_values(torch.diag(torch.tensor([3.0, 4.0])).double()).tolist()
        [4.0, 3.0]

    Reference: Golub & Van Loan 2013, §8.6.2, on what the Gram matrix loses.
    """
    return torch.linalg.eigvalsh(gram(matrix)).flip(0).clamp(min=0).sqrt()


def gram_top(
    matrix: Float64[Tensor, "m n"], top: int
) -> tuple[Float64[Tensor, " s"], Float64[Tensor, "m k"], Float64[Tensor, "k n"]]:
    r"""All singular values and the top k = min(top, s) vectors.

    The eigenvectors V of the short side's Gram matrix span the subspace; QR of A·V and the SVD of its
    triangle (a Rayleigh–Ritz step in float64) give orthonormal U and Vh and the top values.

    Example:
        >>> S, U, Vh = gram_top(torch.diag(torch.tensor([3.0, 4.0])).double(), 1)
        >>> (U * S[:1] @ Vh).abs().round(decimals=9).tolist()
        [[0.0, 0.0], [0.0, 4.0]]

    Reference: Parlett 1998, ch. 11 (Rayleigh–Ritz).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh(gram(matrix))
    s = values.flip(0).clamp(min=0).sqrt()
    k = min(top, s.shape[0])
    short = vectors.flip(1)[:, :k]
    q, r = torch.linalg.qr(wide.T @ short)  # (long side, k)
    u, ritz, vh = torch.linalg.svd(r, full_matrices=False)
    s = torch.cat([ritz, s[k:]]).sort(descending=True).values  # at the seam both are right to rounding
    long, short = q @ u, short @ vh.T
    return (s, short, long.T) if wide is matrix else (s, long, short.T)


def svd_values(matrix: Float64[Tensor, "m n"]) -> Float64[Tensor, " s"]:
    """All singular values by a bidiagonal SVD in float64: slower, and resolved to rounding."""
    wide = matrix.shape[0] < matrix.shape[1]
    return torch.linalg.svdvals(matrix.T if wide else matrix)


def svd_top(
    matrix: Float64[Tensor, "m n"], top: int
) -> tuple[Float64[Tensor, " s"], Float64[Tensor, "m k"], Float64[Tensor, "k n"]]:
    """All singular values and the top k vectors by a full SVD in float64."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    k = min(top, s.shape[0])
    return s, u[:, :k], vh[:k]
