r"""The leading eigenvectors of a Gram matrix by Chebyshev-filtered subspace iteration.

A block X of p > k columns is multiplied by a Chebyshev polynomial in G that is small on the unwanted
eigenvalues [λ_s, λ_{p+1}] and grows fastest above them; then a Rayleigh–Ritz step. Where all eigenvalues
are known, the block's width and the degree follow from them beforehand, and so does whether this is worth
doing at all; where they are not, Ritz values stand in and `certify` proves that nothing was missed.
Converged vectors are locked and projected out of the operator, so that a few dominant ones over a flat
bulk (a bf16 merge) do not limit the degree.

Reference: Zhou, Saad, Tiago & Chelikowsky 2006, "Self-consistent-field calculations using
Chebyshev-filtered subspace iteration", §3; Saad 2011, ch. 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

SMALLEST = 1024  # below this a full eigh costs no more than the values and a filter; measured
_ANGLE = 1e-6  # wanted sine of the angle between the computed and the exact subspace, given a gap at k
_BACKWARD = 1e-10  # wanted residual relative to λ_k where there is no gap
_FLOOR = 1e-14  # relative to λ₁: what float64 products with G resolve
_LOST = 1e8  # growth of the largest over the smallest wanted direction between two orthogonalisations
_MOST_WORK = 7.0  # units of s³ flops; a full eigh costs about 9 once the values are already there, measured
_NARROWEST = 64  # narrower blocks take as long: G is read from memory whatever their width
_WIDTHS = (1.25, 1.5, 2.0, 3.0, 4.0)  # of k
_START = 20.0  # tangent of the angle between a random block and the wanted subspace, roughly
_BLIND_DEGREE = 12  # per round while the interval is only estimated
_SEED = 0  # the same start every time: a resumed run equals an undisturbed one


class NotConvergedError(ArithmeticError):
    """The iteration is not worth starting, or did not reach its target; another solver takes over."""


@dataclass(frozen=True)
class Filter:
    """What the polynomial damps and what the iteration has to reach.

    Attributes:
        lower: lower end of the damped interval.
        upper: its upper end: λ_{p+1} or an estimate.
        kth: λ_k, the smallest wanted eigenvalue that float64 resolves.
        largest: the largest eigenvalue that is not locked.
        target: the residual ‖G x − θ x‖ to reach for each wanted vector.
    """

    lower: float
    upper: float
    kth: float
    largest: float
    target: float

    def rate(self, value: float) -> float:
        """Growth per degree of an eigenvalue outside the interval: |T_d| ≈ exp(d · rate); 0 inside."""
        centre, half = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        return math.acosh(max((value - centre) / half, 1.0))

    @property
    def safe_degree(self) -> int:
        """The degree after which the fastest column has outgrown the slowest wanted one by _LOST."""
        spread = self.rate(self.largest) - self.rate(self.kth)
        return max(1, int(math.log(_LOST) / max(spread, 1e-3)))

    def degree_for(self, decrease: float) -> int:
        """The degree that shrinks unwanted components by a factor."""
        rate = self.rate(self.kth)
        return math.ceil(math.log(max(decrease, 2.0)) / rate) if rate > 0 else 10**9


@dataclass(frozen=True)
class FilterPlan:
    """A block's width p, its filter, and the predicted degree over all rounds."""

    width: int
    filter: Filter
    degree: int

    @property
    def work(self) -> float:
        """What it costs, in columns multiplied by G."""
        return float(self.degree) * max(self.width, _NARROWEST)


@dataclass(frozen=True)
class Leading:
    """The top of a spectrum: values (k,) descending, orthonormal vectors (s, k), columns multiplied by G."""

    values: Tensor
    vectors: Tensor
    columns: int


def plan_filter(values: Sequence[float], k: int) -> FilterPlan | None:
    """The cheapest filter for the top k eigenvectors; None if a full eigendecomposition is cheaper.

    Args:
        values: all eigenvalues, descending.
        k: how many vectors.

    Example:
        >>> plan_filter([2.0] * 10 + [1.0] * 2038, 10).width
        64
        >>> plan_filter([1.0 + 1e-5] * 10 + [1.0] * 2038, 10) is None
        True
    """
    size, largest = len(values), values[0]
    resolved = max(1, sum(1 for value in values[:k] if value > _FLOOR * largest))
    kth = values[resolved - 1]
    gap = kth - values[k] if resolved == k < size else 0.0
    target = _target(largest, kth, gap)
    plans = []
    for width in sorted({max(_NARROWEST, k + 8), *(max(_NARROWEST, k + 8, int(k * part)) for part in _WIDTHS)}):
        if 4 * width <= size:
            # Values within the target of λ_k need no damping: mixed in, they leave a residual within the target.
            below = next((value for value in values[width:] if kth - value > target), values[-1])
            upper = max(below, _FLOOR * largest)
            filter_ = Filter(min(values[-1], 0.0), upper, kth, largest, target)
            plans.append(FilterPlan(width, filter_, filter_.degree_for(_START * kth / target)))
    best = min(plans, key=lambda plan: plan.work, default=None)
    return best if best and best.work <= _most_columns(size) else None


def _target(largest: float, kth: float, gap: float) -> float:
    return max(_ANGLE * gap, _BACKWARD * kth, 8 * _FLOOR * largest)


def _most_columns(size: int) -> float:
    return _MOST_WORK * size / 2


def worthwhile(size: int, k: int) -> bool:
    """Whether a filter can be worth it for k of this many vectors, before any value is known."""
    return size >= SMALLEST and 4 * max(k + 8, _NARROWEST) <= size


def leading_eigenvectors(gram: Float64[Tensor, "s s"], k: int, values: Float64[Tensor, " s"] | None = None) -> Leading:
    """The k leading eigenvectors of a positive semidefinite matrix.

    Args:
        gram: the whole matrix, both triangles.
        k: how many.
        values: all its eigenvalues, descending, if they are known.

    Raises:
        NotConvergedError: a full eigendecomposition is predicted to be cheaper, or the target was not reached.
    """
    size = gram.shape[0]
    if 4 * max(k + 8, _NARROWEST) > size:
        raise NotConvergedError(f"{k} of {size} vectors are too many for a filter")
    if values is None:
        return _iterate(gram, k, min(max(2 * k, k + 8, _NARROWEST), size // 4), None, [])
    known = values.tolist()
    plan = plan_filter(known, k)
    if plan is None:
        raise NotConvergedError("the eigenvalues around k are too close together for a filter to be worth it")
    return _iterate(gram, k, plan.width, plan.filter, known)


@dataclass(frozen=True)
class _State:
    """Ritz pairs of the block: vectors (s, p), images G·vectors, values (p,), residuals (p,); and what is locked."""

    block: Tensor
    image: Tensor
    ritz: Tensor
    residuals: Tensor
    locked: Tensor
    locked_values: Tensor

    @property
    def count(self) -> int:
        """How many vectors are locked."""
        return self.locked.shape[1]


def _iterate(gram: Tensor, k: int, width: int, planned: Filter | None, values: Sequence[float]) -> Leading:
    state = _ritz(gram, gram @ _random_block(gram, width), gram.new_zeros((len(gram), 0)), gram.new_zeros(0))
    columns = 2 * width
    while True:  # until the target or the limit on columns is reached
        wanted = k - state.count
        filter_ = replace(planned, largest=values[state.count]) if planned else _estimate(state, wanted)
        residual = float(state.residuals[:wanted].max())
        if residual <= filter_.target:
            vectors = torch.cat([state.locked, state.block[:, :wanted]], 1)
            return Leading(torch.cat([state.locked_values, state.ritz[:wanted]]), vectors, columns)
        if columns > 2 * _most_columns(len(gram)):
            raise NotConvergedError(f"residual {residual:.1e} after {columns} columns, {filter_.target:.1e} wanted")
        state = _lock(state, wanted, max(filter_.target / 16, _FLOOR * values[0] if values else 0.0))
        degree = min(filter_.degree_for(residual / filter_.target), filter_.safe_degree)
        degree = max(2, degree if planned else min(degree, _BLIND_DEGREE))
        columns += degree * max(state.block.shape[1], _NARROWEST)
        state = _ritz(gram, _filtered(gram, state, filter_, degree), state.locked, state.locked_values)


def _random_block(gram: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn((len(gram), width), dtype=gram.dtype, generator=generator).to(gram.device)


def _estimate(state: _State, wanted: int) -> Filter:
    """The filter that the Ritz values suggest; p-th Ritz value for λ_{p+1}."""
    ritz = state.ritz.tolist()
    overall = max([ritz[0], *state.locked_values[:1].tolist()])
    kth = max(ritz[wanted - 1], _FLOOR * overall)
    target = _target(overall, kth, kth - ritz[wanted])
    return Filter(0.0, max(ritz[-1], _FLOOR * overall), kth, ritz[0], target)


def _lock(state: _State, wanted: int, bound: float) -> _State:
    """Take the leading columns with a residual within the bound out of the block, all but the last wanted one."""
    passed = (state.residuals[: wanted - 1] <= bound).tolist()
    done = passed.index(False) if False in passed else len(passed)
    return _State(
        state.block[:, done:],
        state.image[:, done:],
        state.ritz[done:],
        state.residuals[done:],
        torch.cat([state.locked, state.block[:, :done]], 1),
        torch.cat([state.locked_values, state.ritz[:done]]),
    )


def _filtered(gram: Tensor, state: _State, filter_: Filter, degree: int) -> Tensor:
    """T_d(G) · block by the three-term recurrence, with the locked directions projected out of G."""
    centre, half = (filter_.lower + filter_.upper) / 2, (filter_.upper - filter_.lower) / 2
    weighted = state.locked * state.locked_values
    before, now = state.block.clone(), (state.image - centre * state.block) / half
    for _ in range(degree - 1):
        following = before.mul_(-1).add_(now, alpha=-2 * centre / half)
        following.addmm_(gram, now, alpha=2 / half)
        if state.count:
            following.addmm_(weighted, state.locked.T @ now, alpha=-2 / half)
        before, now = now, following
    return now


def _ritz(gram: Tensor, block: Tensor, locked: Tensor, locked_values: Tensor) -> _State:
    """Rayleigh–Ritz on the span of the block, orthogonal to what is locked."""
    basis = torch.linalg.qr(block - locked @ (locked.T @ block)).Q
    basis = torch.linalg.qr(basis - locked @ (locked.T @ basis)).Q if locked.shape[1] else basis
    image = gram @ basis
    values, rotation = torch.linalg.eigh(basis.T @ image)
    values, rotation = values.flip(0), rotation.flip(1)
    block, image = basis @ rotation, image @ rotation
    return _State(block, image, values, (image - block * values).norm(dim=0), locked, locked_values)


def certify(gram: Float64[Tensor, "s s"], found: Leading) -> bool:
    r"""Whether no eigenvalue above the smallest found one was missed.

    μI − (G − V Θ Vᵀ) has a Cholesky factor only if every eigenvalue of the deflated G is below μ, and
    μ is the smallest found value and a hair.

    Example:
        >>> gram, eye = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), torch.eye(3).double()
        >>> certify(gram, Leading(torch.tensor([3.0, 2.0]).double(), eye[:, :2], 0))
        True
        >>> certify(gram, Leading(torch.tensor([3.0, 1.0]).double(), eye[:, [0, 2]], 0))
        False
    """
    hair = max(1e-9 * float(found.values[-1]), 16 * _FLOOR * float(found.values[0]))
    deflated = torch.addmm(-gram, found.vectors * found.values, found.vectors.T)
    deflated.diagonal().add_(float(found.values[-1]) + hair)
    return int(torch.linalg.cholesky_ex(deflated).info) == 0
