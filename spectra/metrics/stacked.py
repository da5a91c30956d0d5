"""The metrics of many spectra of one shape at once: of thousands of small matrices, calls take longer than sums.

Each entry of `STACKED` is a metric of METRICS once more, row by row of a stack. The definition is the function of one
spectrum; a metric without an entry here is measured one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from spectra.metrics.dominance import places
from spectra.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class Stack:
    """Whole spectra of matrices of one shape, a row each; the largest value of each is resolved.

    Attributes:
        S: singular values (b, s), descending; zeros at the end are none.
        settled: the same, those that are not resolved as zero.
        norms: ‖ΔW‖_F (b,).
        base_norms: ‖W₀‖_F (b,); NaN where it is not known, or zero.
        max_rank: of each.
        shape: (out, in).
    """

    S: np.ndarray
    settled: np.ndarray
    norms: np.ndarray
    base_norms: np.ndarray
    max_rank: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, spectra: Sequence[Spectrum]) -> Stack:
        """Complete spectra with as many values each, of one shape and rank, whose largest value is resolved."""
        S = np.stack([spectrum.S for spectrum in spectra])
        resolutions = np.array([spectrum.resolution for spectrum in spectra])
        norms = np.array([spectrum.norm for spectrum in spectra], dtype=np.float64)
        base_norms = np.array([spectrum.base_norm or np.nan for spectrum in spectra], dtype=np.float64)
        first = spectra[0]
        settled = np.where(resolutions[:, None] < S, S, 0.0)
        return cls(S, settled, norms, base_norms, first.max_rank or 0, first.shape)

    @cached_property
    def sums(self) -> np.ndarray:
        """Σσ."""
        return self.settled.sum(1)

    @cached_property
    def relative(self) -> np.ndarray:
        """σ/σ₁, of what is resolved."""
        return self.settled / self.settled[:, :1]

    @cached_property
    def relative_energies(self) -> np.ndarray:
        """(σ/σ₁)²."""
        return np.square(self.S / self.S[:, :1])

    @cached_property
    def cumulative_energies(self) -> np.ndarray:
        """Σ_{i≤k} (σᵢ/σ₁)² for every k."""
        return np.cumsum(self.relative_energies, axis=1)

    @cached_property
    def stable_ranks(self) -> np.ndarray:
        """(‖ΔW‖_F/σ₁)²; by Python's power, whose last bit is not always that of a product."""
        return np.array([ratio**2 for ratio in (self.norms / self.S[:, 0]).tolist()])

    @cached_property
    def ginis(self) -> np.ndarray:
        """As `dominance.gini`."""
        ascending = np.sort(self.settled[:, : self.max_rank], axis=1)
        n = ascending.shape[1]
        ginis: np.ndarray = (places(n) * ascending).sum(1) / (n * ascending.sum(1))
        return ginis


def _entropy_ranks(weights: np.ndarray) -> np.ndarray:
    p = weights / weights.sum(1, keepdims=True)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    found: np.ndarray = np.exp(-(p * logs).sum(1))
    return found


def _participation_ratios(stack: Stack) -> np.ndarray:
    energies = np.square(stack.relative)
    found: np.ndarray = np.square(energies.sum(1)) / np.square(energies).sum(1)
    return found


def _nuclear_ranks(stack: Stack) -> np.ndarray:
    found: np.ndarray = np.square(stack.relative.sum(1)) / np.square(stack.relative).sum(1)
    return found


def _ranks_at(stack: Stack, share: float) -> np.ndarray:
    energies = stack.cumulative_energies
    goals = np.minimum(share * stack.stable_ranks, energies[:, -1]) * (1 - 1e-15)
    return np.count_nonzero(energies < goals[:, None], axis=1) + 1.0


def _top_shares(stack: Stack, k: int) -> np.ndarray:
    found: np.ndarray = np.minimum(stack.relative_energies[:, :k].sum(1) / stack.stable_ranks, 1.0)
    return found


STACKED: Mapping[str, Callable[[Stack], np.ndarray]] = {
    "norm": lambda stack: stack.norms,
    "sigma_1": lambda stack: stack.S[:, 0],
    "relative_norm": lambda stack: stack.norms / stack.base_norms,
    "stable_rank": lambda stack: stack.stable_ranks,
    "effective_rank": lambda stack: _entropy_ranks(stack.settled),
    "energy_entropy_rank": lambda stack: _entropy_ranks(np.square(stack.settled)),
    "participation_ratio": _participation_ratios,
    "nuclear_rank": _nuclear_ranks,
    "rank_90": partial(_ranks_at, share=0.90),
    "rank_95": partial(_ranks_at, share=0.95),
    "rank_99": partial(_ranks_at, share=0.99),
    "top_1_share": partial(_top_shares, k=1),
    "top_8_share": partial(_top_shares, k=8),
    "top_20_share": partial(_top_shares, k=20),
    "top_value_share": lambda stack: stack.settled[:, 0] / stack.sums,
    "gini_max_rank": lambda stack: stack.ginis,
    "gini_all": lambda stack: 1 - stack.max_rank / min(stack.shape) * (1 - stack.ginis),
}
# Those of which zeros at the end change nothing, so that rows may have a different number of values.
OF_SIGNAL = {name: metric for name, metric in STACKED.items() if name not in ("gini_max_rank", "gini_all")}


def signals(stack: Stack, edges: np.ndarray, energies: np.ndarray, resolutions: np.ndarray) -> Stack:
    """As `signal.signal` of each row; a row of which nothing is above its edge is all zeros.

    Args:
        stack: the whole updates.
        edges: the edge of each.
        energies: the expected energy of the rounding errors of each.
        resolutions: of each.
    """
    m, n = stack.shape
    is_above = np.maximum(edges, resolutions)[:, None] < stack.S
    above = np.square(stack.S)
    variances = (energies / (m * n))[:, None]
    rest = above - variances * (m + n)
    squares = (rest + np.sqrt(np.maximum(np.square(rest) - 4 * np.square(variances) * m * n, 0.0))) / 2
    S = np.where(is_above, np.sqrt(np.maximum(squares, 0.0)), 0.0)
    settled = np.where(resolutions[:, None] < S, S, 0.0)
    norms = np.sqrt(np.square(S).sum(1))
    return Stack(S, settled, norms, stack.base_norms, stack.max_rank, stack.shape)
