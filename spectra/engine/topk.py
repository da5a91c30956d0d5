r"""The leading eigenvectors of a Gram matrix by Chebyshev-filtered subspace iteration, with certificates.

A block X of p > k columns is multiplied by a Chebyshev polynomial in G that is small on the unwanted
eigenvalues [λ_n, λ_{p+1}] and grows fastest outside; then a Rayleigh–Ritz step. Where all eigenvalues are
known beforehand, the block size and the degree follow from them, and so does whether this is worth doing
at all. Vectors that have converged are locked and projected out of the operator, so that a few dominant
ones over a flat bulk (a bf16 merge) do not limit the degree.

Reference: Zhou, Saad, Tiago & Chelikowsky 2006, "Self-consistent-field calculations using
Chebyshev-filtered subspace iteration", §3; Saad 2011, ch. 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

SMALLEST = 1024  # below this a full eigh costs no more than its values and a filter; measured
_ANGLE = 1e-6  # wanted sine of the angle between computed and exact subspace, where there is a gap at k
_BACKWARD = 1e-10  # wanted residual relative to λ_k, where there is none
_FLOOR = 1e-14  # relative to λ₁: what float64 products of G can resolve
_LOST = 1e8  # growth of λ₁ over λ_k after which a column is orthogonalised again: half of the digits
_MOST_WORK = 3.5  # in units of s³ flops: a full eigh costs about 4 more than its values alone
_NARROWEST = 64  # narrower blocks take as long: G is read from memory whatever their width
_WIDTHS = (1.25, 1.5, 2.0, 3.0, 4.0)
_START = 20.0  # tangent of the angle between a random block and the wanted subspace
_ROUNDS = 40


class NotConvergedError(ArithmeticError):
    """The iteration is not worth starting or did not reach its target; another solver takes over."""


@dataclass(frozen=True)
class Filter:
    """A planned filter: p columns, the interval [lower, upper] to damp, and what to reach.

    Attributes:
        width: p, columns of the block.
        lower: lower end of the damped interval.
        upper: its upper end, λ_{p+1} or an estimate.
        kth: λ_k, the smallest wanted eigenvalue.
        largest: λ₁.
        target: the residual ‖G x − θ x‖ to reach for each wanted vector.
        degree: the predicted degree of the polynomial, over all rounds.
    """

    width: int
    lower: float
    upper: float
    kth: float
    largest: float
    target: float
    degree: int

    def rate(self, value: float) -> float:
        """Growth exponent per degree of an eigenvalue: ln |T_d| ≈ d · rate, 0 inside the interval."""
        centre, half = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        return math.acosh(max((value - centre) / half, 1.0))

    def safe_degree(self, largest: float) -> int:
        """The degree after which the fastest column has outgrown the slowest wanted one by _LOST."""
        spread = self.rate(largest) - self.rate(self.kth)
        return max(1, int(math.log(_LOST) / spread)) if spread > 1e-12 else _most_products(1, self.width)


def _most_products(size: int, width: int) -> int:
    return max(8, int(_MOST_WORK * size / (2 * max(width, _NARROWEST)))) if size > 1 else 10**6


def plan_filter(values: Float64[Tensor, " s"], k: int) -> Filter | None:
    """The cheapest filter for the top k eigenvectors given all eigenvalues, descending; None if a full solve is.

    Example:
        >>> values = torch.arange(2000, 0, -1).double() ** -1
        >>> plan_filter(values.sort(descending=True).values, 2).width
        64
    """
    lam = values.tolist()
    size, largest = len(lam), lam[0]
    resolved = sum(1 for value in lam[:k] if value > _FLOOR * largest)
    kth = lam[resolved - 1]
    gap = kth - lam[k] if resolved == k and k < size else 0.0
    target = _target(largest, kth, gap)
    decades = math.log(_START * kth / target)
    best: Filter | None = None
    for width in sorted({max(_NARROWEST, k + 8), *(max(_NARROWEST, int(k * factor)) for factor in _WIDTHS)}):
        if width < k + 8 or 4 * width > size:
            continue
        upper = max(lam[width], _FLOOR * largest)
        candidate = Filter(width, min(lam[-1], 0.0), upper, kth, largest, target, 0)
        rate = candidate.rate(kth)
        degree = math.ceil(decades / rate) if rate > 0 else 10**9
        if degree <= _most_products(size, width) and (best is None or degree * width < best.degree * best.width):
            best = Filter(width, candidate.lower, upper, kth, largest, target, degree)
    return best


def _target(largest: float, kth: float, gap: float) -> float:
    return max(_ANGLE * gap, _BACKWARD * kth, 8 * _FLOOR * largest)


@dataclass(frozen=True)
class Leading:
    """The top of a spectrum: Ritz values (k,), orthonormal vectors (s, k), residuals (k,), products used."""

    values: Tensor
    vectors: Tensor
    residual: float
    products: int


def leading_eigenvectors(
    gram: Float64[Tensor, "s s"], k: int, values: Float64[Tensor, " s"] | None = None
) -> Leading:
    """The k leading eigenvectors of a positive semidefinite matrix.

    Args:
        gram: the matrix.
        k: how many; 4 (k + 8) ≤ s.
        values: all its eigenvalues, descending, if they are known.

    Raises:
        NotConvergedError: a full solve is predicted to be cheaper, or the target was not reached.
    """
    size = gram.shape[0]
    if 4 * max(k + 8, _NARROWEST) > size:
        raise NotConvergedError(f"{k} of {size} vectors are too many for a filter")
    filter_ = None if values is None else plan_filter(values, k)
    if values is not None and filter_ is None:
        raise NotConvergedError("the eigenvalues near k are too close together for a filter to be worth it")
    width = filter_.width if filter_ else min(max(2 * k, _NARROWEST, k + 8), size // 4)
    return _iterate(gram, k, width, filter_)


def _iterate(gram: Tensor, k: int, width: int, planned: Filter | None) -> Leading:
    block = _random_block(gram, width)
    image = gram @ block
    locked = gram.new_zeros((gram.shape[0], 0))
    locked_values = gram.new_zeros(0)
    step = planned or _guess(gram, k, block, image)
    used, residual = 1, math.inf
    limit = 2 * _most_products(gram.shape[0], width)
    for _ in range(_ROUNDS):
        largest = float(locked_values[-1]) if len(locked_values) == k else _largest(step, locked_values, image, block)
        degree = min(_remaining(step, residual), step.safe_degree(largest))
        block = _filtered(gram, block, image, step, degree, locked, locked_values)
        used += degree
        block, image, ritz, residuals = _rayleigh_ritz(gram, block, locked)
        wanted = k - len(locked_values)
        step = planned or _estimate(step, locked_values, ritz, wanted)
        residual = float(residuals[:wanted].max())
        if residual <= step.target:
            vectors = torch.cat([locked, block[:, :wanted]], 1)
            return Leading(torch.cat([locked_values, ritz[:wanted]]), vectors, residual, used)
        if used > limit:
            break
        done = _leading_run(residuals[: wanted - 1] <= max(step.target / 16, _FLOOR * step.largest))
        locked = torch.cat([locked, block[:, :done]], 1)
        locked_values = torch.cat([locked_values, ritz[:done]])
        block, image = block[:, done:], image[:, done:]
    raise NotConvergedError(f"residual {residual:.1e} after {used} products, {step.target:.1e} wanted")
