"""ΔW against W₀: one function per metric, and the table of those that make a column of `alignment`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float64
from scipy.special import betainc
from torch import Tensor

from spectra.deltas.forms import Form
from spectra.engine.extremes import within_range
from spectra.spectrum import times_power

_ROUNDING = 1e-14  # float64, with room for the length of the sums


@dataclass(frozen=True, eq=False)
class Triplets:
    """Singular triplets of one matrix, the largest first; those that rounding decides are left out.

    Attributes:
        U: left vectors (m, k).
        S: singular values (k).
        Vh: right vectors, transposed (k, n).
    """

    U: Float64[Tensor, "m k"]
    S: Float64[Tensor, " k"]
    Vh: Float64[Tensor, "k n"]

    def first(self, k: int) -> Triplets:
        """The first k, or all where there are fewer."""
        return Triplets(self.U[:, :k], self.S[:k], self.Vh[:k])

    @property
    def rank(self) -> int:
        """The number of values that are not zero to rounding; directions behind it are not determined."""
        return int((self._rounding < self.S).sum())

    @property
    def _rounding(self) -> Float64[Tensor, " _"]:
        """What values, and distances between them, are not told from zero by."""
        return max(self.U.shape[0], self.Vh.shape[1]) * torch.finfo(torch.float64).eps * self.S[:1]

    @property
    def groups(self) -> list[int]:
        """How many values are equal to rounding, group by group, of those that are not zero.

        The directions of a group are determined as a space, and not one by one.

        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> Triplets(eye, torch.tensor([2.0, 1.0, 1.0, 0.0]).double(), eye).groups
        [1, 2]
        """
        S = self.S[: self.rank]
        ends = (self._rounding < S[:-1] - S[1:]).nonzero().flatten() + 1
        cuts = [0, *ends.tolist(), len(S)]
        return [stop - start for start, stop in pairwise(cuts) if stop > start]

    def nearest(self, directions: Float64[Tensor, "m j"]) -> Float64[Tensor, " j"]:
        """The largest |cos(y_j, x_i)| of each direction over the left vectors whose value is not zero.

        Of a group of equal values it is the cosine with the space of them, which is the largest that any basis has.
        """
        if not self.rank:
            return directions.new_zeros(directions.shape[1])
        near = (self.U[:, : self.rank].mT @ directions).abs()
        return torch.stack([part.norm(dim=0) for part in torch.split(near, self.groups)]).amax(0).clamp(max=1.0)


@dataclass(frozen=True, eq=False)
class AgainstBase:
    """What metrics of ΔW against W₀ are computed from: W₀ as all of its triplets, ΔW, and the tops of ΔW and W.

    Attributes:
        base: all s = min(m, n) triplets of W₀.
        update: ΔW (m, n) in any form.
        update_top: the top triplets of ΔW: as many as an adapter's rank, k of a full fine-tune.
        tuned_top: the top k triplets of W = W₀ + ΔW, fewer where its rank is less.
        k: how many directions were asked for.
        epsilon: the cosine below which a direction of W is an intruder.

    Example:
        >>> eye = torch.eye(3, dtype=torch.float64)
        >>> base = Triplets(eye[:, :2], torch.tensor([2.0, 1.0]).double(), eye[:2])
        >>> spike = Triplets(eye[:, 2:], torch.tensor([3.0]).double(), eye[2:])
        >>> from spectra.deltas.forms import Dense
        >>> seen = AgainstBase(base, Dense(3 * eye[:, 2:] @ eye[2:]), spike, spike, k=1)
        >>> intruders(seen), largest_cosines(seen), left_in_top(seen)
        (1, [0.0], 0.0)
    """

    base: Triplets
    update: Form
    update_top: Triplets
    tuned_top: Triplets
    k: int = 10
    epsilon: float = 0.5

    @cached_property
    def base_top(self) -> Triplets:
        """W₀'s top k, fewer where its rank is less."""
        return self.base.first(min(self.k, self.base.rank))

    @cached_property
    def unit(self) -> tuple[Form, int]:
        """D and e with ΔW = 2^e·D, so that squares of D are in float64's range whatever those of ΔW are."""
        return within_range(self.update)

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        form, exponent = self.unit
        return times_power(form.norm, exponent)

    @cached_property
    def seen_from_left(self) -> Float64[Tensor, "n s"]:
        """ΔWᵀx_i / ‖ΔW‖ of every left vector x_i of W₀."""
        form, _ = self.unit
        return form.T.times(self.base.U) / form.norm

    @cached_property
    def left_energy(self) -> Float64[Tensor, " s"]:
        """‖x_iᵀΔW‖² / ‖ΔW‖² of every left vector x_i of W₀: what share of ΔW's energy it carries."""
        return self.seen_from_left.square().sum(0)

    @cached_property
    def right_energy(self) -> Float64[Tensor, " s"]:
        """‖ΔW z_i‖² / ‖ΔW‖² of every right vector z_i of W₀."""
        form, _ = self.unit
        return (form.times(self.base.Vh.mT) / form.norm).square().sum(0)

    @property
    def tuned_norm(self) -> float:
        """‖W₀ + ΔW‖_F, from ‖W₀‖² + 2⟨W₀, ΔW⟩ + ‖ΔW‖² with ⟨W₀, ΔW⟩ = Σ σ_i x_iᵀΔW z_i."""
        size = max(length(self.base.S), self.norm)
        if not size:
            return 0.0
        S, own = self.base.S / size, self.norm / size
        inner = own * float(((self.seen_from_left * self.base.Vh.mT).sum(0) * S).sum())
        return size * math.sqrt(max(float(S.square().sum()) + 2 * inner + own**2, 0.0))

    def base_within(self, left: Tensor, right: Tensor) -> float:
        """‖LᵀW₀R‖_F for orthonormal L (m, k) and R (n, k); 0 where only rounding is left of it."""
        within = (left.mT @ self.base.U * self.base.S) @ (self.base.Vh @ right)
        size, whole = length(within), length(self.base.S)
        return size if size > _ROUNDING * whole else 0.0


def length(values: Tensor) -> float:
    """The square root of the sum of all squares, whatever these are in float64.

    >>> tiny, huge = (torch.tensor(values, dtype=torch.float64) for values in ([3e-300, 4e-300], [3e300]))
    >>> f"{length(tiny):.6g}", f"{length(huge):.6g}"
    ('5e-300', '3e+300')
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    exponent = math.frexp(largest)[1] if 0 < largest < math.inf else 0
    half = -exponent // 2
    return times_power(float((values * 2.0**half * 2.0 ** (-exponent - half)).norm()), exponent)


def cosines(seen: AgainstBase) -> list[list[float]]:
    """|cos(x_i, y_j)| of W₀'s top k left vectors (rows) and W's (columns): where the model's main directions went.

    Reference: Shuttleworth et al. 2024, the heatmaps of LoRA against full fine-tuning.
    """
    values: list[list[float]] = (seen.base_top.U.mT @ seen.tuned_top.U).abs().clamp(max=1.0).tolist()
    return values


def largest_cosines(seen: AgainstBase) -> list[float]:
    """max_i |cos(y_j, x_i)| of each top left vector y_j of W, over all left vectors x_i of W₀ whose σ is not zero.

    Where several σ of W₀ are equal, their x_i are any basis of one space, and the cosine with that space counts.

    Reference: Shuttleworth et al. 2024, Alg. 1; the absolute value is in the authors' code, not in the text.
    """
    largest: list[float] = seen.base.nearest(seen.tuned_top.U).tolist()
    return largest


def intruders(seen: AgainstBase) -> int:
    """How many of W's top k left vectors have a largest cosine under ε with W₀'s: directions that W₀ does not know.

    Reference: Shuttleworth et al. 2024, Alg. 1, with k = 10 of their Fig. 4 and ε = .5 of their App. I.
    """
    return sum(cosine < seen.epsilon for cosine in largest_cosines(seen))


def intruders_chance(seen: AgainstBase) -> float:
    """How many of k uniformly random directions of ℝᵐ would be intruders, at least: all of them once m is large.

    k·max(0, 1 − s·P(c² ≥ ε²)) with c² ~ Beta(½, (m − 1)/2): the union bound over W₀'s s vectors, exact from ε = 1/√2.
    A space of g vectors with equal σ counts once, with Beta(g/2, (m − g)/2).
    """
    m, count = seen.tuned_top.U.shape
    sizes = Counter(seen.base.groups)
    if m in sizes:
        return 0.0
    bound = min(seen.epsilon**2, 1.0)
    near = sum(times * (1.0 - float(betainc(g / 2, (m - g) / 2, bound))) for g, times in sizes.items())
    return count * max(0.0, 1.0 - near)


def tie_note(seen: AgainstBase) -> str:
    """What equal singular values leave undetermined; "" where none are equal among those that count.

    >>> eye = torch.eye(3, dtype=torch.float64)
    >>> from spectra.deltas.forms import Dense
    >>> base = Triplets(eye, torch.tensor([2.0, 1.0, 1.0]).double(), eye)
    >>> tie_note(AgainstBase(base, Dense(eye), base, base.first(2), k=2))[:38]
    'σ_2 and σ_3 of W₀ are equal to roundin'
    """
    start = 0
    for size in seen.base.groups:
        if start < seen.k < start + size:
            return (
                f"σ_{seen.k} and σ_{seen.k + 1} of W₀ are equal to rounding: "
                f"its top {seen.k} directions, and shares in them, are not determined"
            )
        start += size
    return ""


def amplification(seen: AgainstBase) -> float:
    """‖ΔW‖_F / ‖UᵀW₀V‖_F, U and V the top r directions of ΔW: what it does there against what W₀ does.

    Infinite where W₀ does nothing there.

    Reference: Hu et al. 2021, §7.3 and App. H.4.
    """
    return _ratio(seen.norm, seen.base_within(seen.update_top.U, seen.update_top.Vh.mT))


def amplification_own(seen: AgainstBase) -> float:
    """The control of `amplification` with W₀'s own top r directions, whose part of W₀ is the largest.

    Reference: Hu et al. 2021, Table 7.
    """
    return _ratio(seen.norm, length(seen.base.S[: len(seen.update_top.S)]))


def amplification_random(seen: AgainstBase) -> float:
    """The control with random directions, in closed form: √E‖UᵀW₀V‖_F² = r‖W₀‖_F/√(mn) for uniform U and V.

    Reference: Hu et al. 2021, Table 7, which draws one pair.
    """
    m, n = seen.update.shape
    return _ratio(seen.norm, len(seen.update_top.S) * length(seen.base.S) / math.sqrt(m * n))


def left_in_top(seen: AgainstBase) -> float:
    """‖U₀ₖᵀΔW‖_F² / ‖ΔW‖_F²: the share of ΔW's energy in the span of W₀'s top k left vectors."""
    return float(seen.left_energy[: len(seen.base_top.S)].sum())


def right_in_top(seen: AgainstBase) -> float:
    """‖ΔW V₀ₖ‖_F² / ‖ΔW‖_F²: the share of ΔW's energy in the span of W₀'s top k right vectors."""
    return float(seen.right_energy[: len(seen.base_top.S)].sum())


def left_chance(seen: AgainstBase) -> float:
    """k/m: `left_in_top` of an update that knows nothing of W₀, on average."""
    return len(seen.base_top.S) / seen.update.shape[0]


def right_chance(seen: AgainstBase) -> float:
    """k/n: `right_in_top` of an update that knows nothing of W₀, on average."""
    return len(seen.base_top.S) / seen.update.shape[1]


def left_deciles(seen: AgainstBase) -> list[float]:
    """`left_energy` by tenths of W₀'s spectrum, the largest σ first; they sum to 1 where m ≤ n."""
    return _deciles(seen.left_energy)


def right_deciles(seen: AgainstBase) -> list[float]:
    """`right_energy` by tenths of W₀'s spectrum, the largest σ first; they sum to 1 where m ≥ n."""
    return _deciles(seen.right_energy)


def principal_top(seen: AgainstBase) -> float:
    """‖U_kU_kᵀ ΔW V_kV_kᵀ‖_F² / ‖ΔW‖_F² with W₀'s top k: the part that PiSSA trains.

    Reference: Meng et al. 2024 (PiSSA).
    """
    return _within(seen, seen.base_top)


def principal_bottom(seen: AgainstBase) -> float:
    """The same share with W₀'s last k triplets: the part that MiLoRA trains.

    Reference: Wang et al. 2024 (MiLoRA).
    """
    kept = slice(max(len(seen.base.S) - seen.k, 0), None)
    return _within(seen, Triplets(seen.base.U[:, kept], seen.base.S[kept], seen.base.Vh[kept]))


def principal_random(seen: AgainstBase) -> float:
    """The same share's mean over uniformly random k-dimensional subspaces: k²/(mn)."""
    return left_chance(seen) * right_chance(seen)


def sigma_1_ratio(seen: AgainstBase) -> float:
    """σ₁(W)/σ₁(W₀): what became of the weight's own largest singular value."""
    return _ratio(float(seen.tuned_top.S[0]), float(seen.base.S[0])) if len(seen.tuned_top.S) else 0.0


def sigma_ratios(seen: AgainstBase) -> list[float]:
    """σ_j(W)/σ_j(W₀) of the top k: what became of the weight's own spectrum; infinite where σ_j(W₀) is zero."""
    return [_ratio(float(now), float(before)) for now, before in zip(seen.tuned_top.S, seen.base.S, strict=False)]


def stable_rank_base(seen: AgainstBase) -> float:
    """‖W₀‖_F² / σ₁(W₀)²."""
    return float((seen.base.S / seen.base.S[0]).square().sum()) if seen.base.rank else math.nan


def stable_rank_tuned(seen: AgainstBase) -> float:
    """‖W‖_F² / σ₁(W)² of W = W₀ + ΔW, to be read beside `stable_rank_base`."""
    return (seen.tuned_norm / float(seen.tuned_top.S[0])) ** 2 if len(seen.tuned_top.S) else math.nan


ALIGNMENT: dict[str, Callable[[AgainstBase], int | float | list[float] | list[list[float]]]] = {
    "intruders": intruders,
    "intruders_chance": intruders_chance,
    "largest_cosines": largest_cosines,
    "amplification": amplification,
    "amplification_own": amplification_own,
    "amplification_random": amplification_random,
    "left_in_top": left_in_top,
    "right_in_top": right_in_top,
    "left_chance": left_chance,
    "right_chance": right_chance,
    "left_deciles": left_deciles,
    "right_deciles": right_deciles,
    "principal_top": principal_top,
    "principal_bottom": principal_bottom,
    "principal_random": principal_random,
    "sigma_1_ratio": sigma_1_ratio,
    "sigma_ratios": sigma_ratios,
    "stable_rank_base": stable_rank_base,
    "stable_rank_tuned": stable_rank_tuned,
    "cosines": cosines,
}


def _deciles(energy: Float64[Tensor, " s"]) -> list[float]:
    """Sums over tenths, cut at round(i·s/10).

    >>> _deciles(torch.ones(20).double())
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    cuts = [round(i * len(energy) / 10) for i in range(11)]
    return [float(energy[start:stop].sum()) for start, stop in pairwise(cuts)]


def _within(seen: AgainstBase, part: Triplets) -> float:
    form, _ = seen.unit
    return float((part.U.mT @ form.times(part.Vh.mT) / form.norm).square().sum())


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf
