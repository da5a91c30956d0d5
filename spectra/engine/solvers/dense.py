"""Singular values and top vectors of a dense update, through its float64 Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.deltas.thin import times
from spectra.engine.solvers import topk
from spectra.engine.solvers.calibration import eigenvalues

Moment = tuple[float, float]  # Σσ⁴ and what it may be off by
_NOTED: ContextVar[list[list[Moment]] | None] = ContextVar("noted", default=None)
Triplets = tuple[Tensor, Tensor, Tensor]  # S (…, s), U (…, m, k), Vh (…, k, n)

_LEAF = 256  # rows of a diagonal block of the Gram matrix that is computed whole; measured
# Times √s, s = min(m, n): see `gram_values`.
GRAM_RESOLUTION = 2 * 2**-26
_PRODUCT_BOUND = 1e-10  # on ‖Gz − A(Aᵀz)‖ relative to ‖G‖_F‖z‖, where rounding leaves 1e-14
SVD_RESOLUTION = 1e-13


def gram(matrix: Float64[Tensor, "*batch m n"], *, mirrored: bool = True) -> Float64[Tensor, "*batch s s"]:
    """A·Aᵀ or Aᵀ·A, whichever is smaller, s = min(m, n).

    One matrix on a CPU: only the upper triangle is computed, by halving, then mirrored unless the caller
    needs one triangle only (the other is then undefined). Batches are one product.

    Example:
        >>> gram(torch.tensor([[3.0, 4.0]]).double()).tolist()
        [[25.0]]
    """
    wide, noted = _wide(matrix), _NOTED.get()
    product = wide @ wide.mT if wide.dim() > 2 or wide.is_cuda else _by_halves(wide, mirrored or noted is not None)
    if noted is not None:
        noted.append(_moments(wide, product))
    return product


def _by_halves(wide: Tensor, mirrored: bool) -> Tensor:
    size = wide.shape[0]
    product = torch.empty((size, size), dtype=torch.float64)
    _upper_triangle(wide, product)
    if mirrored:
        for start in range(_LEAF, size, _LEAF):
            stop = min(start + _LEAF, size)
            product[start:stop, :start] = product[:start, start:stop].T
    return product


@contextmanager
def noted_moments() -> Iterator[list[list[Moment]]]:
    """Σσ⁴ of the matrices whose Gram matrices are formed inside, in order: what the check needs costs nothing there.

    Example:
        >>> with noted_moments() as moments:
        ...     _ = gram(torch.tensor([[3.0, 4.0]]).double())
        >>> moments
        [[(625.0, 0.0)]]
    """
    moments: list[list[Moment]] = []
    token = _NOTED.set(moments)
    try:
        yield moments
    finally:
        _NOTED.reset(token)


def _moments(wide: Tensor, product: Tensor) -> list[Moment]:
    """Σσ⁴ = ‖G‖_F² of each matrix, once G is held against A·Aᵀ by what both make of a random vector.

    Raises:
        RuntimeError: they differ.

    Reference: Freivalds 1977.
    """
    probe = _signs(wide.shape[-2], wide.shape[-1]).to(wide)
    off = torch.linalg.matrix_norm(product @ probe - wide @ (wide.mT @ probe))
    norms = torch.linalg.matrix_norm(product)
    if not bool((off <= _PRODUCT_BOUND * math.sqrt(len(probe)) * norms).all()):
        raise RuntimeError("its Gram matrix is not the product of the matrix with its transpose")
    return [(norm, 0.0) for norm in norms.square().reshape(-1).tolist()]


@lru_cache(maxsize=64)  # thousands of matrices may have one shape
def _signs(count: int, seed: int) -> Tensor:
    """A random vector of ±1, (count, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (count, 1), generator=generator) * 2 - 1).to(torch.float64)


def fourth_moment(matrix: Tensor) -> Moment:
    """Σσ⁴ = ‖A·Aᵀ‖_F², by blocks of A's rows, for results that did not start from the Gram matrix.

    Example:
        >>> fourth_moment(torch.diag(torch.tensor([2.0, 1.0])).double())[0]
        17.0
    """
    rows = torch.split(_wide(matrix), _LEAF)
    twice = sum(float((a @ b.mT).square().sum()) for i, a in enumerate(rows) for b in rows[:i])
    return 2 * twice + sum(float((a @ a.mT).square().sum()) for a in rows), 0.0


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def _upper_triangle(rows: Tensor, product: Tensor) -> None:
    """rows·rowsᵀ into the diagonal blocks of width ≤ _LEAF and everything above them."""
    size = rows.shape[0]
    if size <= _LEAF:
        torch.mm(rows, rows.T, out=product)
        return
    half = -(-size // (2 * _LEAF)) * _LEAF
    _upper_triangle(rows[:half], product[:half, :half])
    _upper_triangle(rows[half:], product[half:, half:])
    torch.mm(rows[:half], rows[half:].T, out=product[:half, half:])


def gram_values(matrix: Float64[Tensor, "*batch m n"]) -> Float64[Tensor, "*batch s"]:
    r"""All singular values, descending: σ = √λ of the float64 Gram matrix.

    Forming G and its eigenvalues are backward stable: each λ̂ is that of a matrix G + E, so |λ̂ − λ| ≤ ‖E‖₂ ≤ c·s·ε·λ₁
    (Weyl), s = min(m, n), ε = 2⁻⁵². So a zero shows as up to √(cs·ε)·σ₁, and a value σ is off by up to
    c·s·ε·σ₁²/(2σ). Over constant matrices, signs, projectors and products of low rank, s = 2 … 3500, c was at most
    0.25, and under 0.03 where the matrix was random. Values up to 2√(s·ε)·σ₁ are not resolved (GRAM_RESOLUTION·√s:
    6e-7·σ₁ at s = 384, 2e-6·σ₁ at 4096); the ones just above are right to 3 %.

    Example:
        >>> gram_values(torch.diag(torch.tensor([3.0, 4.0])).double()).tolist()
        [4.0, 3.0]

    Reference: Golub & Van Loan 2013 (Weyl's bound on eigenvalues).
    """
    return eigenvalues(gram(matrix, mirrored=False)).sqrt()


def gram_top(
    matrix: Float64[Tensor, "*batch m n"], top: int, product: Float64[Tensor, "*batch s s"] | None = None
) -> Triplets:
    r"""All singular values and the top k = min(top, s) vectors, from every eigenvector of the Gram matrix.

    Args:
        matrix: A.
        top: how many vectors.
        product: `gram(matrix)`, where it is already there.

    Example:
        >>> S, U, Vh = gram_top(torch.diag(torch.tensor([3.0, 4.0])).double(), 1)
        >>> (U * S[:1] @ Vh).abs().round(decimals=9).tolist()
        [[0.0, 0.0], [0.0, 4.0]]
    """
    product = gram(matrix, mirrored=False) if product is None else product
    values, vectors = torch.linalg.eigh(product.mT)
    k = min(top, values.shape[-1])
    return _with_rest(values.flip(-1).clamp(min=0).sqrt(), lift(matrix, vectors.flip(-1)[..., :k]))


def lanczos_top(matrix: Float64[Tensor, "m n"], top: int, product: Float64[Tensor, "s s"] | None = None) -> Triplets:
    """As `gram_top`, with the eigenvalues first and then a Krylov space that they make cheap.

    Raises:
        NotConvergedError: the spectrum around k is too flat for it, or the target was not reached.
    """
    product = gram(matrix) if product is None else product
    if not topk.promising(product, top):
        raise topk.NotConvergedError(f"{top} vectors are too many for so flat a spectrum")
    values = eigenvalues(product)
    leading = topk.leading_eigenvectors(product, top, values)
    return _with_rest(values.sqrt(), lift(matrix, leading.vectors))


def lanczos_only_top(
    matrix: Float64[Tensor, "m n"], top: int, product: Float64[Tensor, "s s"] | None = None
) -> Triplets:
    """The top triplets alone, and a proof (a Cholesky factor) that no larger one was missed.

    Raises:
        NotConvergedError: the target was not reached, or the proof failed.
    """
    product = gram(matrix) if product is None else product
    leading = topk.leading_eigenvectors(product, top)
    if not topk.certify(product, leading):
        raise topk.NotConvergedError("a larger singular value was missed")
    return lift(matrix, leading.vectors)


def lift(matrix: Float64[Tensor, "*batch m n"], short: Float64[Tensor, "*batch s k"]) -> Triplets:
    r"""Singular triplets of A from orthonormal vectors X that span the subspace on the short side.

    A Rayleigh–Ritz step on A itself in float64: QR of AᵀX, then the SVD of its triangle.

    Reference: Parlett 1998, ch. 11 (Rayleigh–Ritz).
    """
    wide = _wide(matrix)
    basis = torch.linalg.qr(short).Q
    q, r = torch.linalg.qr(times(wide.mT, basis))  # (long side, k)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    long, short = times(q, u), times(basis, vh.mT)
    return (s, short, long.mT) if wide is matrix else (s, long, short.mT)


def _with_rest(values: Tensor, top: Triplets) -> Triplets:
    """All values, the top ones from the Ritz step; at the seam both are right to rounding."""
    s, u, vh = top
    return torch.cat([s, values[..., s.shape[-1] :]], -1).sort(-1, descending=True).values, u, vh


def svd_values(matrix: Float64[Tensor, "*batch m n"]) -> Float64[Tensor, "*batch s"]:
    """All singular values by a bidiagonal SVD in float64: slower, and resolved to rounding.

    A wide matrix goes in transposed, which is several times faster.
    """
    return torch.linalg.svdvals(matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT)


def svd_top(matrix: Float64[Tensor, "*batch m n"], top: int) -> Triplets:
    """All singular values and the top k vectors by a full SVD in float64."""
    if matrix.shape[-2] < matrix.shape[-1]:
        s, u, vh = svd_top(matrix.mT, top)
        return s, vh.mT, u.mT
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    k = min(top, s.shape[-1])
    return s, u[..., :k], vh[..., :k, :]
