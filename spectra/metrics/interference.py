"""Several updates of one weight: what adding them up does to each. From their triplets, so no product is formed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.metrics.alignment import Triplets, length
from spectra.metrics.shared_basis import SharedBasis
from spectra.metrics.sides import Side

RESIDUAL = 0.05  # of ‖ΣΔ‖_F, what the directions that SAR counts may leave out
_CANCELLED = 1e-12  # of Σ‖Δ‖_F: a sum that small is rounding


@dataclass(frozen=True, eq=False)
class Together:
    """The updates of one weight side by side, each as its triplets Δ_t = U_t Σ_t V_tᵀ.

    Attributes:
        values: all singular values of each update that are more than rounding; none of an update that is zero.
        left: U_t of every update.
        right: V_t of every update.
        total: the triplets of ΣΔ, in the bases of the two sides; none where the updates cancel.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> two, first = torch.tensor([2.0]).double(), eye[:, :1]
        >>> nothing = Triplets(eye[:, :0], torch.zeros(0).double(), eye[:0])
        >>> seen = Together((two, two), Side.of([first, -first]), Side.of([first, first]), nothing)
        >>> cosines(seen), norm_ratio(seen), sar(seen)
        ([[1.0, -1.0], [-1.0, 1.0]], 0.0, [nan, nan])
    """

    values: tuple[Float64[Tensor, " _"], ...]
    left: Side
    right: Side
    total: Triplets

    @cached_property
    def norms(self) -> list[float]:
        """‖Δ_t‖_F."""
        return [length(values) for values in self.values]

    @cached_property
    def basis(self) -> SharedBasis:
        """What the updates share beside their mean."""
        return SharedBasis(self.values, self.left, self.right)


def sum_of(values: tuple[Tensor, ...], left: Side, right: Side) -> Float64[Tensor, "d e"]:
    """ΣΔ in the bases of the two sides; exactly zero where only rounding would be left."""
    total = left.together * torch.cat(values) @ right.together.mT
    size = sum(float(own.norm()) for own in values)
    return total if float(total.norm()) > _CANCELLED * size else torch.zeros_like(total)


def cosines(seen: Together) -> list[list[float]]:
    """⟨Δ_s, Δ_t⟩/(‖Δ_s‖‖Δ_t‖) of every pair; NaN beside an update that is zero; 0 for unrelated ones.

    ⟨Δ_s, Δ_t⟩ = Σᵢⱼ σᵢσⱼ (U_sᵀU_t)ᵢⱼ (V_sᵀV_t)ᵢⱼ.
    """
    values = torch.cat([own / norm for own, norm in zip(seen.values, seen.norms, strict=True)])
    products = values[:, None] * seen.left.overlap * seen.right.overlap * values
    sizes = [len(own) for own in seen.values]
    blocks = [[float(block.sum()) for block in torch.split(rows, sizes, 1)] for rows in torch.split(products, sizes)]
    # ⟨Δ_t, Δ_t⟩ is rounded as ⟨Δ_s, Δ_t⟩ is: beside it, and not beside 1, an update and its negative have exactly −1.
    return [
        [_cosine(inner, math.sqrt(blocks[s][s] * blocks[t][t])) for t, inner in enumerate(row)]
        for s, row in enumerate(blocks)
    ]


def _cosine(inner: float, lengths: float) -> float:
    return max(-1.0, min(1.0, inner / lengths)) if lengths else math.nan


def mean_cosine(seen: Together) -> float:
    """The mean of `cosines` over the pairs of updates that have one; 0 by chance."""
    values = [value for s, row in enumerate(cosines(seen)) for value in row[s + 1 :] if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


def norms(seen: Together) -> list[float]:
    """‖Δ_t‖_F of every update."""
    return seen.norms


def norm_ratio(seen: Together) -> float:
    """‖ΣΔ‖_F² / Σ‖Δ‖_F²: N where all are equal, 1 where they are orthogonal (as by chance), 0 where they cancel."""
    largest = max(seen.norms)
    if not largest:
        return math.nan
    return float((seen.total.S / largest).square().sum()) / sum((norm / largest) ** 2 for norm in seen.norms)


def sti_raw(seen: Together) -> float:
    """‖(UᵀU − I) Σ (VᵀV − I)‖₁, summed over the entries: 0 where no two updates share a direction on both sides.

    The norm is not defined in the paper; entry by entry is our reading.

    Reference: Gargiulo et al. 2024 (TSV), singular task interference.
    """
    left, right = seen.left.overlap, seen.right.overlap
    eye = torch.eye(len(left), dtype=left.dtype, device=left.device)
    return float(((left - eye) * torch.cat(seen.values) @ (right - eye)).abs().sum())


def sti(seen: Together) -> float:
    """`sti_raw` divided by Σσ over all updates, so that it does not grow with their size."""
    total = float(torch.cat(seen.values).sum())
    return sti_raw(seen) / total if total else math.nan


def sar_k(seen: Together) -> int:
    """How many top directions of ΣΔ leave out at most .05 of its norm: the ones that `sar` counts.

    Reference: Marczak et al. 2025, ε = .05; the authors' script uses another k.
    """
    tails = seen.total.S.square().flip(0).cumsum(0).flip(0).sqrt()  # what is left out before each direction
    return int((tails > RESIDUAL * seen.total.S.norm()).sum())


def sar(seen: Together) -> list[float]:
    """‖U_kU_kᵀΔ_t‖_F / ‖Δ_t‖_F of each update, U_k the top directions of ΣΔ: how much of it the sum's span keeps.

    NaN where the updates cancel, and for an update that is zero.

    Reference: Marczak et al. 2025, subspace alignment ratio.
    """
    k = sar_k(seen)
    top = seen.total.U[:, :k]
    kept = [length(top.mT @ U * values) for U, values in zip(seen.left.vectors, seen.values, strict=True)]
    return [inside / norm if k and norm else math.nan for inside, norm in zip(kept, seen.norms, strict=True)]


def mean_sar(seen: Together) -> float:
    """The mean of `sar` over the updates that have one."""
    values = [value for value in sar(seen) if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


def sar_chance(seen: Together) -> float:
    """√(k/m): what `sar` is for an update that has nothing to do with the sum, in the root mean square."""
    k = sar_k(seen)
    return math.sqrt(k / seen.left.size) if k else math.nan


def mean_share(seen: Together) -> float:
    """N·‖Δ̄‖_F² / Σ‖Δ‖_F², Δ̄ = ΣΔ/N: the share of the energy that is the updates' common mean; 1 where all are equal."""
    return norm_ratio(seen) / len(seen.values)


def mean_share_chance(seen: Together) -> float:
    """1/N: what `mean_share` is for orthogonal updates, as unrelated ones are by chance."""
    return 1 / len(seen.values)


def shared_k(seen: Together) -> int:
    """How many output directions the `shared` numbers count: as many as any one update needs for 90 % of its energy."""
    return seen.basis.k


def shared(seen: Together) -> float:
    """The share of Σ‖Δ_t − Δ̄‖² in the top `shared_k` left directions of all updates together, their mean taken out.

    .9 and more where all updates write into one space of a single one's size, about .9/N where each has its own.
    """
    return seen.basis.share


def shared_null(seen: Together) -> float:
    """`shared` of random updates with these values, the common part taken out of them (`SharedBasis.null`)."""
    return seen.basis.null()


def shared_kept(seen: Together) -> list[float]:
    """`shared` update by update: the share of ‖Δ_t − Δ̄‖² in those directions."""
    return seen.basis.kept()


INTERFERENCE: dict[str, Callable[[Together], int | float | list[float] | list[list[float]]]] = {
    "cosines": cosines,
    "mean_cosine": mean_cosine,
    "norms": norms,
    "norm_ratio": norm_ratio,
    "sti": sti,
    "sti_raw": sti_raw,
    "sar": sar,
    "mean_sar": mean_sar,
    "sar_k": sar_k,
    "sar_chance": sar_chance,
    "mean_share": mean_share,
    "mean_share_chance": mean_share_chance,
    "shared_k": shared_k,
    "shared": shared,
    "shared_null": shared_null,
    "shared_kept": shared_kept,
}
