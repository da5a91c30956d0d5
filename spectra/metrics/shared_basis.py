"""Do several updates of one weight share more than their mean? Output directions of all, against random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.metrics.sides import Side, random_side

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENERGY = 0.9  # of each update, which the directions that count have to hold at least
_ROUNDING = 1e-12  # of the updates' energy: what is left under it without their mean is none
_MOST_DRAWS = 16  # of random updates, whose mean is the null: one of them is .02 off in a small space
_SMALL = 512  # entries in the bases of the sides, from half of which on one draw is near enough


@dataclass(frozen=True, eq=False)
class SharedBasis:
    r"""The left singular directions of [Δ₁ − Δ̄ | … | Δ_N − Δ̄], Δ̄ = ΣΔ/N: what updates share beside their mean.

    Σ_t (Δ_t − Δ̄)(Δ_t − Δ̄)ᵀ = Σ_t Δ_tΔ_tᵀ − ΣΔ·(ΣΔ)ᵀ/N, in the bases of the two sides, so that no product is formed.

    Attributes:
        values: the singular values of each update; none of one that is zero.
        left: its left vectors.
        right: its right ones.

    Example:
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> two, first = torch.tensor([2.0]).double(), eye[:, :1]
        >>> basis = SharedBasis((two, two), Side.of([first, -first]), Side.of([first, first]))
        >>> basis.k, basis.energies.tolist(), [round(kept, 12) for kept in basis.kept()]
        (1, [8.0], [1.0, 1.0])

    Reference: Stoica et al. 2024 (KnOTS) decompose [Δ₁ | … | Δ_N]; Kaushik et al. 2025 (arXiv 2512.05117) claim that
    few directions are enough, which was disputed: the mean and a Gaussian null explain much of it. Hence the mean is
    taken out here, and `null` stands beside.
    """

    values: tuple[Float64[Tensor, " _"], ...]
    left: Side
    right: Side

    @cached_property
    def k(self) -> int:
        """How many directions count: as many as every single update needs for 90 % of its own energy.

        The rank would be all of them for full fine-tunes, in which everything lies.
        """
        return max(map(_needed, self.values), default=0)

    @cached_property
    def _scaled(self) -> list[Float64[Tensor, "d _"]]:
        """U_tΣ_t of each update."""
        return [U * values for U, values in zip(self.left.vectors, self.values, strict=True)]

    @cached_property
    def _total(self) -> Float64[Tensor, "d e"]:
        """ΣΔ."""
        return torch.cat(self._scaled, 1) @ self.right.together.mT

    @cached_property
    def _square(self) -> Float64[Tensor, "d d"]:
        """ΣΔ·(ΣΔ)ᵀ."""
        return self._total @ self._total.mT

    @cached_property
    def _eigen(self) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
        """Energies, descending, and their directions."""
        everything = torch.cat(self._scaled, 1)
        values, vectors = torch.linalg.eigh(everything @ everything.mT - self._square / len(self.values))
        return values.flip(0).clamp(min=0.0), vectors.flip(1)

    @property
    def energies(self) -> Float64[Tensor, " k"]:
        """σ² of the top k directions, descending."""
        return self._eigen[0][: self.k]

    @property
    def share(self) -> float:
        """The share of Σ‖Δ_t − Δ̄‖² that lies in the top k directions; NaN where the updates are all equal."""
        return self.share_of(self.k)

    def share_of(self, k: int) -> float:
        """The same of another number of directions."""
        values = self._eigen[0]
        total = float(values.sum())
        return float(values[:k].sum()) / total if total > _ROUNDING * sum(self._energy) else math.nan

    def kept(self) -> list[float]:
        """‖P(Δ_t − Δ̄)‖²/‖Δ_t − Δ̄‖² of each update, P on the top k directions; NaN where an update is the mean."""
        axes = self._eigen[1][:, : self.k]
        mean = float(self._square.trace()) / len(self.values) ** 2
        shares = []
        for apart, energy in zip(self._apart(), self._energy, strict=True):
            inside, whole = float(((apart @ axes) * axes).sum()), float(apart.trace())
            shares.append(min(inside / whole, 1.0) if whole > _ROUNDING * (energy + mean) else math.nan)
        return shares

    def null(self) -> float:
        """`share`, of as many directions, of random updates, as these would have it if they had nothing but a mean.

        Their values are the leading ones, as many as its rank, of each Δ_t − cΔ̄: c is the part of Δ̄ that is more than
        what unrelated updates leave there, so that these keep their own values, for which the null is exact. Left and
        right directions are uniformly random, each update's by itself. NaN where the updates are all equal, as `share`
        is.
        """
        if math.isnan(self.share):
            return math.nan
        common = self._common
        values = tuple(
            torch.linalg.eigvalsh(apart).flip(0).clamp(min=0.0).sqrt()[: len(own)]
            for apart, own in zip(self._apart(common), self.values, strict=True)
        )
        draws = min(_MOST_DRAWS, max(1, _SMALL // len(self._square)))
        return math.fsum(self._drawn(values, seed).share_of(self.k) for seed in range(draws)) / draws

    @property
    def _common(self) -> float:
        """c, from 0 to 1, with cΔ̄ an estimate of what all updates have in common.

        The mean of N unrelated updates with Σ‖Δ_t − Δ̄‖² = E has an energy of E/(N(N − 1)) by itself.

        Reference: James and Stein 1961, the positive part.
        """
        count = len(self.values)
        mean = float(self._square.trace()) / count**2
        if not mean:
            return 0.0
        by_chance = (sum(self._energy) - count * mean) / (count * (count - 1))
        return min(max(1.0 - by_chance / mean, 0.0), 1.0)

    def _drawn(self, values: tuple[Tensor, ...], seed: int) -> SharedBasis:
        """Random updates of these values and of the same shapes."""
        counts, device = [len(own) for own in values], self._square.device
        sides = (self.left, self.right)
        left, right = (random_side(side.size, counts, 2 * seed + i, device) for i, side in enumerate(sides))
        return SharedBasis(values, left, right)

    @property
    def _energy(self) -> list[float]:
        """‖Δ_t‖² of each update."""
        return [float(values.square().sum()) for values in self.values]

    def _apart(self, part: float = 1.0) -> Iterator[Float64[Tensor, "d d"]]:
        """(Δ_t − cΔ̄)(Δ_t − cΔ̄)ᵀ of each update, c the part of the mean that is taken out."""
        count = len(self.values) / part if part else math.inf
        for scaled, V in zip(self._scaled, self.right.vectors, strict=True):
            cross = scaled @ (self._total @ V).mT / count
            yield scaled @ scaled.mT - cross - cross.mT + self._square / count**2


def _needed(S: Tensor) -> int:
    """How many of these descending values hold `_ENERGY` of Σσ².

    >>> _needed(torch.tensor([3.0, 1.0])), _needed(torch.tensor([2.0, 2.0, 1.0])), _needed(torch.zeros(0))
    (1, 3, 0)
    """
    if not len(S):
        return 0
    held = S.square().cumsum(0) / S.square().sum()
    return min(int((held < _ENERGY * (1 - 1e-12)).sum()) + 1, len(S))
