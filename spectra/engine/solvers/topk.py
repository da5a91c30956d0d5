r"""The leading eigenvectors of a Gram matrix by block Lanczos, on G or on an inverse (μI − G)⁻¹.

Where all eigenvalues are known, the dimension that Lanczos needs follows from them beforehand, and so do the
cheapest operator and whether this is worth doing at all. A decaying spectrum is done by products with G alone.
Where the wanted values lie close together over a bulk (a Gaussian matrix, a full fine-tune), μ is put just
above the largest: the Cholesky factor of μI − G costs s³/3, and its inverse spreads the wanted values apart.
A few dominant values over a bulk (a bf16 merge) are found first and taken out of G before that.

Whatever the way, vectors count only if ‖G x − θ x‖ in float64 is within the target and θ agrees with the
known eigenvalues one by one, so that nothing is missed; where they are not known, `certify` proves it.

Reference: Grimes, Lewis & Simon 1994, "A shifted block Lanczos algorithm for solving sparse symmetric
generalized eigenproblems"; Saad 2011, ch. 6 (how fast it converges).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.deltas.thin import times
from spectra.engine.solvers.lanczos import Krylov, Operator, random_block

SMALLEST = 1024  # below this a full eigh costs no more than the values and the vectors one by one; measured
_ANGLE = 1e-6  # wanted sine of the angle between the computed and the exact subspace, given a gap at k
_BACKWARD = 1e-10  # wanted residual relative to λ_k where there is no gap
_FLOOR = 1e-14  # relative to λ₁: what float64 products with G resolve
_SAME = 64 * _FLOOR  # relative to λ₁: two float64 eigenvalues that differ by less are one and the same
_WIDTH = 16  # of a block; narrower ones take as long, for G is read from memory whatever their width; measured
_CLUSTER = 1e-4  # relative to the smallest wanted value: values this close need a column each in the block
_ABOVE = 0.05  # of λ_1 − λ_k: how far above λ_1 the shift is
_GUARDS = 6  # times k: how many of the unwanted values may get a zero of their own
_SPLITS = 4  # places at which dominant values may be set apart that are looked at
_START = 20.0  # tangent of the angle between a random block and the wanted subspace, roughly
_MOST_SHARE = 0.5  # of all dimensions in a Krylov space that is still worth starting
_MOST_WORK = 7.0  # units of s³ flops; a full eigh costs about 9 once the values are already there, measured
_PRODUCT, _SOLVE, _CHOLESKY = 3.5, 5.0, 0.65  # of s², s² and s³: what a column and a factor cost, in such flops
_HOPE = 4.0  # times the target: the bound on a residual at which the residual itself is worth computing


class NotConvergedError(ArithmeticError):
    """The iteration is not worth starting, or did not reach its target; another solver takes over."""


@dataclass(frozen=True)
class Stage:
    """Eigenvectors start … stop − 1, and how they are found.

    Attributes:
        start: position of the first.
        stop: one after the last.
        shift: μ, where the operator is (μI − G)⁻¹; None where it is G.
        width: of the block.
        dimension: of the Krylov space, as predicted.
        target: the residual ‖G x − θ x‖ to reach for each vector.
    """

    start: int
    stop: int
    shift: float | None
    width: int
    dimension: int
    target: float

    def work(self, size: int) -> float:
        """What it costs, in s³ flops: products or solves, orthogonalising, and small eigenproblems."""
        d = self.dimension / size
        return (_CHOLESKY + _SOLVE * d if self.shift is not None else _PRODUCT * d) + 8 * d**2 + 40 * d**3


@dataclass(frozen=True)
class Leading:
    """The top of a spectrum: values (k,) descending, orthonormal vectors (s, k), columns multiplied by G."""

    values: Tensor
    vectors: Tensor
    columns: int


def plan_stages(values: Sequence[float], k: int) -> tuple[Stage, ...] | None:
    """The cheapest way to the top k eigenvectors; None if a full eigendecomposition is cheaper.

    Args:
        values: all eigenvalues, descending.
        k: how many vectors.

    Example:
        >>> decaying, flat = [0.5**i for i in range(2048)], [2 - i / 1024 for i in range(2048)]
        >>> [(stage.start, stage.stop, stage.shift is None) for stage in plan_stages(decaying, 10)]
        [(0, 10, True)]
        >>> [(stage.start, stage.stop, stage.shift is None) for stage in plan_stages(flat, 40)]
        [(0, 40, False)]
        >>> plan_stages(flat, 1000) is None
        True
    """
    size, largest = len(values), values[0]
    resolved = max(1, sum(1 for value in values[:k] if value > _FLOOR * largest))
    kth = values[resolved - 1]
    target = _target(largest, kth, kth - values[k] if resolved == k < size else 0.0)
    ways: list[tuple[Stage | None, ...]] = [
        (_stage(values, 0, k, target, inverse=False),),
        (_stage(values, 0, k, target, inverse=True),),
    ]
    for split in _splits(values[:k]):
        first = _stage(values, 0, split, max(target / 16, 2 * _FLOOR * largest), inverse=False)
        ways.append((first, _stage(values, split, k, target, inverse=True)))
    complete = [tuple(stage for stage in way if stage) for way in ways if None not in way]
    best = min(complete, key=lambda way: sum(stage.work(size) for stage in way), default=None)
    return best if best and sum(stage.work(size) for stage in best) <= _MOST_WORK else None


def _target(largest: float, kth: float, gap: float) -> float:
    return max(_ANGLE * gap, _BACKWARD * kth, 8 * _FLOOR * largest)


def _splits(wanted: Sequence[float]) -> list[int]:
    """Where the wanted values drop most: how many come before each of the largest drops."""
    drops = [(wanted[i] / max(wanted[i - 1], 1e-300), i) for i in range(1, len(wanted))]
    return [place for _, place in sorted(drops)[:_SPLITS]]


def _stage(values: Sequence[float], start: int, stop: int, target: float, *, inverse: bool) -> Stage | None:
    """How to find some of the eigenvectors, the ones before them taken out; None if that takes too many columns."""
    size, first = len(values), values[start]
    kth = max(values[stop - 1], _FLOOR * values[0])
    # Values within the target of λ_k need no damping: mixed in, they leave a residual within the target.
    tied = next((i for i in range(stop, size) if kth - values[i] > target), size)
    below = values[tied] if tied < size else 0.0
    shift = first + max(_ABOVE * (first - kth), _ABOVE * (first - below), 1e-12 * values[0]) if inverse else None

    def image(value: float) -> float:
        return 1 / (shift - value) if shift is not None else value

    images = [image(max(value, kth)) for value in values[start:stop]] + [image(value) for value in values[stop:]]
    width = max(_WIDTH, _largest_cluster(images[: stop - start], _CLUSTER * image(kth)))
    decrease = math.log(_START * max(kth / target, 1.0))
    dimension = _dimension(images, stop - start, tied - start, width, decrease)
    return Stage(start, stop, shift, width, dimension, target) if dimension <= _MOST_SHARE * size else None


def _dimension(images: Sequence[float], count: int, tied: int, width: int, decrease: float) -> int:
    """The dimension in which block Lanczos finds the largest values of an operator, within a tenth or so (measured).

    A space of dimension p + b·d holds, roughly, the images of the block under polynomials of degree d that have
    p − k more zeros, on the unwanted λ_{k+1} … λ_p; Chebyshev damps the rest. A zero close to λ_k takes from the
    polynomial there, too: half of what it would take if b = 1.

    Args:
        images: all values of the operator, descending.
        count: k.
        tied: position of the first value that has to be damped.
        width: b.
        decrease: logarithm of the factor by which unwanted components must shrink.
    """
    smallest, lowest = images[count - 1], images[-1]
    if tied == len(images):
        return count + 2 * width
    least, p, lost = len(images), tied, 0.0
    while p < min(len(images), count + _GUARDS * max(count, width)):
        upper = max(images[p], lowest + _FLOOR * smallest)
        rate = math.acosh(max((2 * smallest - upper - lowest) / (upper - lowest), 1.0))
        if rate > 0:
            least = min(least, p + width * math.ceil((decrease + lost) / rate))
        middle = images[min(p + width // 2, len(images) - 1)]
        if smallest > middle:
            lost += 0.5 * max(math.log(max(middle - lowest, 1e-300) / (smallest - middle)), 0.0)
        p += width
    return max(least, count + 2 * width)


def _largest_cluster(values: Sequence[float], within: float) -> int:
    """The largest number of values, in descending order, that lie within a distance of one another."""
    first, most = 0, 0
    for last, value in enumerate(values):
        while values[first] - value > within:
            first += 1
        most = max(most, last - first + 1)
    return most


def worthwhile(size: int, k: int) -> bool:
    """Whether this can be worth it for k of this many vectors, before anything is computed; measured."""
    return size >= SMALLEST and 7 * k <= size


def promising(gram: Float64[Tensor, "s s"], k: int) -> bool:
    """Whether the values are worth computing before the vectors: not for many vectors of a flat spectrum; measured.

    (Σλ)² / Σλ², which is tr(G)² / ‖G‖_F² and costs next to nothing, is how many values there are that matter.

    Example:
        >>> decaying, flat = (torch.diag(0.5 ** torch.arange(20) * x + 1 - x).double() for x in (1, 0))
        >>> promising(decaying, 3), promising(flat, 3), promising(flat, 2)
        (True, False, True)
    """
    return 10 * k <= len(gram) or float(gram.trace() / gram.norm()) ** 2 < k


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
    if 2 * (k + 2 * _WIDTH) > size:  # for callers of their own; `worthwhile` asks for more
        raise NotConvergedError(f"{k} of {size} vectors are too many for a Krylov space")
    if values is None:
        return _blind(gram, k)
    known = values.tolist()
    stages = plan_stages(known, k)
    if stages is None:
        raise NotConvergedError("the eigenvalues around k are too close together for a Krylov space to be worth it")
    best = Leading(gram.new_zeros(0), gram.new_zeros((size, 0)), 0)
    for stage in stages:
        best = _run(gram, stage, best, values)
    return best


def _run(gram: Tensor, stage: Stage, before: Leading, values: Tensor) -> Leading:
    """One stage: grow the space to what was predicted, and on until the target is reached."""
    operator: Operator = partial(times, gram) if stage.shift is None else _inverse(gram, stage.shift, before)
    room = min(2 * stage.dimension, int(1.25 * _MOST_SHARE * gram.shape[0]))
    space = Krylov(operator, random_block(before.vectors, stage.width), room)
    count, check_at = stage.stop - stage.start, int(0.9 * stage.dimension)
    while not space.full:
        space.grow()
        if space.dimension < max(check_at, count + stage.width):
            continue
        check_at = space.dimension + max(2 * stage.width, space.dimension // 16)
        values_found, coefficients, bounds = space.ritz(count)
        if stage.shift is not None:  # r of the inverse becomes (μI − G) r / θ, which is at most μ r / θ
            bounds = stage.shift * bounds / values_found.clamp(min=1 / stage.shift)
        if float(bounds.max()) <= _HOPE * stage.target:
            vectors = torch.cat([before.vectors, space.vectors(coefficients)], 1)
            leading, residual = _rayleigh_ritz(gram, vectors, before.columns + space.dimension)
            off = float((leading.values - values[: stage.stop]).abs().max())
            if residual <= stage.target and off <= max(stage.target, _SAME * float(values[0])):
                return leading
    raise NotConvergedError(
        f"{space.dimension} dimensions do not hold {count} vectors to {stage.target:.1e}, as wanted"
    )


def _blind(gram: Tensor, k: int) -> Leading:
    """Products with G alone, until Ritz values and residuals say that the target is reached."""
    space = Krylov(
        partial(times, gram), random_block(gram.new_zeros((len(gram), 0)), _WIDTH), int(_MOST_SHARE * len(gram))
    )
    check_at, target = k + k // 2 + 4 * _WIDTH, 0.0
    while not space.full:
        space.grow()
        if space.dimension < check_at:
            continue
        check_at = space.dimension + max(2 * _WIDTH, space.dimension // 8)
        found, coefficients, bounds = space.ritz(k + 1)
        kth, following = max(float(found[k - 1]), _FLOOR * float(found[0])), float(found[k])
        target = _target(float(found[0]), kth, kth - following)
        if float(bounds[:k].max()) <= target:
            leading, residual = _rayleigh_ritz(gram, space.vectors(coefficients[:, :k]), space.dimension)
            if residual <= target:
                return leading
    raise NotConvergedError(f"{space.dimension} dimensions do not hold {k} vectors to {target:.1e}, as wanted")


def _inverse(gram: Tensor, shift: float, taken: Leading) -> Operator:
    """(μI − G')⁻¹, where G' is G without what is taken.

    Raises:
        NotConvergedError: μ is not above every eigenvalue of G'.
    """
    factor, refused = _factored(_below(gram, shift, taken))
    if refused:
        raise NotConvergedError(f"an eigenvalue above {shift:.6e} is left")

    def solve(block: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor.T, block, upper=False)
        return torch.linalg.solve_triangular(factor, half, upper=True)

    return solve


def _factored(matrix: Tensor) -> tuple[Tensor, bool]:
    """The upper Cholesky factor of a symmetric matrix, and whether there is none.

    On the CPU it takes the matrix's place: the transpose is in LAPACK's order.
    """
    if matrix.is_cuda:
        factor, refused = torch.linalg.cholesky_ex(matrix, upper=True)
    else:
        refused = torch.empty((), dtype=torch.int32)
        factor, refused = torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, refused))
    return factor, bool(refused)


def _below(gram: Tensor, shift: float, taken: Leading) -> Tensor:
    """μI − (G − V Θ Vᵀ)."""
    below = gram.neg()
    if len(taken.values):
        below.addmm_(taken.vectors * taken.values, taken.vectors.T)
    below.diagonal().add_(shift)
    return below


def _rayleigh_ritz(gram: Tensor, block: Tensor, columns: int) -> tuple[Leading, float]:
    """The best eigenpairs in the span of the block, and their largest residual."""
    basis = torch.linalg.qr(block).Q
    image = times(gram, basis)
    values, rotation = torch.linalg.eigh(times(basis.T, image))
    values, rotation = values.flip(0), rotation.flip(1)
    vectors = times(basis, rotation)
    residual = float((times(image, rotation) - vectors * values).norm(dim=0).max())
    return Leading(values, vectors, columns + block.shape[1]), residual


def certify(gram: Float64[Tensor, "s s"], leading: Leading) -> bool:
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
    hair = max(1e-9 * float(leading.values[-1]), 16 * _FLOOR * float(leading.values[0]))
    shifted = _below(gram, float(leading.values[-1]) + hair, leading)
    return not _factored(shifted)[1]
