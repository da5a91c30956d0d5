r"""A proof that no left vector of W₀ comes near a direction y, without W₀'s vectors, from a few products with W₀.

Write y = Σ cᵢxᵢ over the eigenvectors of G = W₀W₀ᵀ. The cᵢ² are point masses of a measure, and d Lanczos steps from y
give its Gauss quadrature: nodes θ₁ < … < θ_d and weights w (Golub & Welsch 1969). The Chebyshev–Markov–Stieltjes
inequalities, μ(−∞, θⱼ] ≤ w₁ + … + wⱼ ≤ μ(−∞, θⱼ₊₁), leave no more than wⱼ₋₁ + wⱼ + wⱼ₊₁ to a neighbourhood of θⱼ that
reaches neither of the next nodes: an eigenvalue, or several that rounding cannot tell apart, has no more than that.
(Two terms would do for a single eigenvalue in exact arithmetic.) Once every such sum is below ε², no |cos(y, xᵢ)|
reaches ε. What W₀'s top holds of y is known, and is taken out of it first.

Reference: Akhiezer 1965, "The Classical Moment Problem" (the inequalities); Golub & Welsch 1969, "Calculation of Gauss
quadrature rules".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.deltas.thin import times
from spectra.metrics.alignment import Triplets

MARGIN = 1e-6  # of cos²: what float64 and the accuracy of W₀'s top could be wrong by, many times over
_EVERY = 4  # steps between looks at the bound
_STEPS = 128


@dataclass(frozen=True, eq=False)
class Nearness:
    """What is known of max_i |cos(y_j, x_i)| over all left vectors x_i of W₀.

    Attributes:
        least: the largest among W₀'s top (`Triplets.nearest`), which the maximum cannot be under.
        most: what the maximum cannot be over.
        steps: how many products with W₀W₀ᵀ it took.
    """

    least: Float64[Tensor, " k"]
    most: Float64[Tensor, " k"]
    steps: int

    def intruders(self, epsilon: float) -> int | None:
        """How many y_j are nowhere within ε, or None where the bounds leave one of them open."""
        known = self.least.square() >= epsilon**2 + MARGIN
        far = self.most.square() < epsilon**2 - MARGIN
        return int(far.sum()) if bool((known | far).all()) else None


def nearness(
    base: Float64[Tensor, "m n"], top: Triplets, directions: Float64[Tensor, "m k"], *, epsilon: float = 0.5
) -> Nearness:
    """Bounds on the largest cosine of each direction with all left vectors of W₀, as tight as ε needs them.

    Args:
        base: W₀.
        top: its top triplets, as many as are at hand.
        directions: orthonormal y_j in its columns.
        epsilon: the cosine that has to be decided.

    Example:
        >>> eye = torch.eye(32, dtype=torch.float64)
        >>> base = torch.diag(torch.arange(32.0, 0.0, -1.0)).double()
        >>> near, far = eye[:, :1], torch.full((32, 1), 32**-0.5, dtype=torch.float64)
        >>> top = Triplets(eye[:, :2], torch.tensor([32.0, 31.0]).double(), eye[:2])
        >>> nearness(base, top, torch.cat([near, far], 1)).intruders(0.5)
        1
    """
    if len(top.S) < min(base.shape) and top.groups:  # the last value may have equals among those that are not here
        top = top.first(top.rank - top.groups[-1])
    least = top.nearest(directions)
    base, known, directions = _within_range(base, top.U, directions)
    rest = _without(known, directions)
    mass = rest.square().sum(0)
    bound = mass.clone()
    open_ = ((least.square() < epsilon**2) & (mass >= epsilon**2 - MARGIN)).nonzero().flatten()
    steps = 0
    if len(open_):
        mass_found, steps = _largest_mass(base, known, rest[:, open_], (epsilon**2 - 2 * MARGIN) / mass[open_])
        bound[open_] = mass_found * mass[open_]
    return Nearness(least, torch.maximum(least.square(), bound).sqrt().clamp(max=1.0), steps)


def _largest_mass(base: Tensor, known: Tensor, start: Tensor, enough: Tensor) -> tuple[Tensor, int]:
    """Bounds on the largest point mass of each column's normalised measure, until all are under `enough`; the steps.

    The recurrences run side by side, so that each step is two products with W₀. All vectors are kept orthogonal.
    """
    m, k = start.shape
    most = min(_STEPS, m - known.shape[1])
    bound = start.new_ones(k)
    basis = start.new_zeros(k, most, m)
    diagonal, beside = start.new_zeros(k, most), start.new_zeros(k, most)
    vectors = start / start.norm(dim=0)
    for step in range(most):
        basis[:, step] = vectors.mT
        following = times(base, times(base.mT, vectors))
        diagonal[:, step] = (following * vectors).sum(0)
        done = basis[:, : step + 1]
        for _ in range(2):  # in turn: what is left of one in the other would grow from step to step
            following = following.mT.unsqueeze(2)
            following = (following - done.mT @ (done @ following)).squeeze(2).mT
            following = _without(known, following)
        following = following.mT
        beside[:, step] = following.norm(dim=1)
        ended = bool((beside[:, step] <= 1e-10 * diagonal.amax(1)).any())
        if step % _EVERY == _EVERY - 1 or step == most - 1 or ended:
            bound = torch.minimum(bound, _neighbours(diagonal[:, : step + 1], beside[:, :step]))
            if ended or bool((bound < enough).all()):
                return bound, step + 1
        vectors = (following / beside[:, step : step + 1]).mT
    return bound, most


def _neighbours(diagonal: Tensor, beside: Tensor) -> Tensor:
    """max_j (w_{j−1} + w_j + w_{j+1}) of each tridiagonal matrix' Gauss weights; all mass of fewer than three nodes."""
    whole = torch.diag_embed(diagonal)
    if beside.shape[1]:
        whole = whole + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    weights = torch.linalg.eigh(whole).eigenvectors[:, 0].square()
    return (weights[:, :-2] + weights[:, 1:-1] + weights[:, 2:]).amax(1) if weights.shape[1] > 2 else weights.sum(1)


def _without(known: Tensor, vectors: Tensor) -> Tensor:
    """What is orthogonal to the columns of `known`, twice for rounding."""
    for _ in range(2):
        vectors = vectors - known @ (known.mT @ vectors)
    return vectors


def _within_range(base: Tensor, known: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in an orthonormal basis of what W₀'s columns span, if they are fewer than its rows.

    What of a direction lies outside is near no vector of W₀; R of W₀ = QR has W₀'s values, and QᵀX its left vectors.
    """
    if base.shape[0] <= base.shape[1]:
        return base, known, directions
    Q, R = torch.linalg.qr(base)
    return R, Q.mT @ known, Q.mT @ directions
