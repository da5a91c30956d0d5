"""Do several updates of one weight share more than their mean? Output directions of all, against random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.metrics.alignment import Triplets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ENERGY = 0.9  # of each update, which the directions that count have to hold at least
_SEED = 0  # of the random updates: the same inputs give the same null


@dataclass(frozen=True, eq=False)
class SharedBasis:
    r"""The left singular directions of [Δ₁ − Δ̄ | … | Δ_N − Δ̄], Δ̄ = ΣΔ/N: what updates share beside their mean.

    Σ_t (Δ_t − Δ̄)(Δ_t − Δ̄)ᵀ = U·K·Uᵀ with U = [U₁ | … | U_N] and K = Σ² − Σ·VVᵀ·Σ/N, so that no product is formed: its
    eigenvalues are those of R·K·Rᵀ, where R is U's triangular factor.

    Attributes:
        updates: the triplets of each update; none of one that is zero.

    Example:
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> two, minus_two = (Triplets(sign * eye[:, :1], torch.tensor([2.0]).double(), eye[:1]) for sign in (1, -1))
        >>> basis = SharedBasis((two, minus_two))
        >>> basis.k, basis.energies.tolist(), basis.kept()
        (1, [8.0], [1.0, 1.0])

    Reference: Stoica et al. 2024 (KnOTS) decompose [Δ₁ | … | Δ_N]; Kaushik et al. 2025 (arXiv 2512.05117) claim that
    few directions are enough, which was disputed: the mean and a Gaussian null explain much of it. Hence the mean is
    taken out here, and `null` stands beside.
    """

    updates: tuple[Triplets, ...]

    @cached_property
    def k(self) -> int:
        """How many directions count: as many as every single update needs for 90 % of its own energy.

        The rank would be all of them for full fine-tunes, in which everything lies.
        """
        return max((_needed(update.S) for update in self.updates), default=0)

    @cached_property
    def _sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, R), or its triangular factor (R, R) where that is smaller; all values; VVᵀ."""
        U = torch.cat([update.U for update in self.updates], 1)
        Vh = torch.cat([update.Vh for update in self.updates])
        left = torch.linalg.qr(U, "r").R if U.shape[1] < U.shape[0] else U
        return left, torch.cat([update.S for update in self.updates]), Vh @ Vh.mT

    @cached_property
    def _eigen(self) -> tuple[Float64[Tensor, " s"], Float64[Tensor, "s s"]]:
        """Energies, descending, and their directions in the coordinates of `_sides`."""
        left, S, right = self._sides
        inner = torch.diag(S**2) - S[:, None] * right * S / len(self.updates)
        values, vectors = torch.linalg.eigh(left @ inner @ left.mT)
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
        total, size = float(values.sum()), sum(float(update.S.square().sum()) for update in self.updates)
        return float(values[:k].sum()) / total if total > 1e-12 * size else math.nan

    def kept(self) -> list[float]:
        """‖P(Δ_t − Δ̄)‖²/‖Δ_t − Δ̄‖² of each update, P on the top k directions; NaN where an update is the mean."""
        _, S, right = self._sides
        axes = self._eigen[1][:, : self.k]
        found = []
        for update, apart in zip(self.updates, self._apart(), strict=True):
            inside, whole = (float(((rows @ right) * rows).sum()) for rows in (axes.mT @ apart, apart))
            size = float(update.S.square().sum()) + float(S.square().sum()) / len(self.updates) ** 2
            found.append(min(inside / whole, 1.0) if whole > 1e-12 * size else math.nan)
        return found

    def null(self) -> float:
        """`share`, of as many directions, of random updates, each with the leading values that it has without the mean.

        As many values as its rank; their left and right directions are uniformly random, each update's by itself.
        """
        right = self._sides[2]
        without = []
        for update, apart in zip(self.updates, self._apart(), strict=True):
            values = torch.linalg.eigvalsh(apart @ right @ apart.mT).flip(0).clamp(min=0.0).sqrt()
            without.append(Triplets(update.U, values[: len(update.S)], update.Vh))
        return SharedBasis(random_like(without)).share_of(self.k)

    def _apart(self) -> Iterator[Tensor]:
        """Each Δ_t − Δ̄ as coefficients: of `_sides`' left axes and all of V's rows."""
        left, S, _ = self._sides
        everything, start = left * S, 0
        for update in self.updates:
            stop = start + len(update.S)
            apart = -everything / len(self.updates)
            apart[:, start:stop] += everything[:, start:stop]
            yield apart
            start = stop


def _needed(S: Tensor) -> int:
    """How many of these descending values hold `_ENERGY` of Σσ².

    >>> _needed(torch.tensor([3.0, 1.0])), _needed(torch.tensor([2.0, 2.0, 1.0])), _needed(torch.zeros(0))
    (1, 3, 0)
    """
    if not len(S):
        return 0
    held = S.square().cumsum(0) / S.square().sum()
    return min(int((held < _ENERGY * (1 - 1e-12)).sum()) + 1, len(S))


def random_like(updates: Sequence[Triplets]) -> tuple[Triplets, ...]:
    """Updates of the same singular values whose directions are uniformly random, left and right, each by itself.

    Example:
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> (found,) = random_like([Triplets(eye[:, :2], torch.tensor([2.0, 1.0]).double(), eye[:2])])
        >>> found.S.tolist(), bool(torch.allclose(found.U.mT @ found.U, eye[:2, :2]))
        ([2.0, 1.0], True)
    """
    generator = torch.Generator().manual_seed(_SEED)

    def directions(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn.to(like.device)).Q

    return tuple(Triplets(directions(update.U), update.S, directions(update.Vh.mT).mT) for update in updates)
