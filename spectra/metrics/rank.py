"""How many directions an update uses: ranks, counted softly and hard."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np

from spectra.errors import TruncatedSpectrumError
from spectra.spectrum import Spectrum


def values(spectrum: Spectrum, metric: str) -> np.ndarray:
    """The whole spectrum, unresolved values as zero.

    Raises:
        TruncatedSpectrumError: only the top of the spectrum is there, so the metric would be wrong.
    """
    if not spectrum.complete:
        raise TruncatedSpectrumError(
            f"{metric} needs all singular values of {spectrum.name}, and {len(spectrum.S)} of "
            f"{spectrum.max_rank} are there; decompose without only_top"
        )
    return spectrum.settled


def stable_rank(spectrum: Spectrum) -> float:
    r"""Σσ² / σ₁², between 1 and the rank. Exact under truncation, since the norm is of the whole ΔW.

    Example:
        >>> stable_rank(Spectrum("a", (2, 2), S=[4.0, 3.0]))
        1.5625

    Reference: Rudelson & Vershynin 2007, abstract; they call it "numerical rank".
    """
    return ((spectrum.norm or 0.0) / float(spectrum.S[0])) ** 2 if spectrum.rank else math.nan


def effective_rank(spectrum: Spectrum) -> float:
    r"""exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ: the entropy of σ, not of σ².

    Example:
        >>> round(effective_rank(Spectrum("a", (3, 3), S=[1.0, 1.0, 0.0])), 12)
        2.0

    Raises:
        TruncatedSpectrumError: some values are missing.

    Reference: Roy & Vetterli 2007.
    """
    return _entropy_rank(values(spectrum, "effective_rank"))


def energy_entropy_rank(spectrum: Spectrum) -> float:
    r"""exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ²/Σσ²; elsewhere often called "effective rank", too.

    Example:
        >>> round(energy_entropy_rank(Spectrum("a", (3, 3), S=[1.0, 1.0, 0.0])), 12)
        2.0

    Raises:
        TruncatedSpectrumError: some values are missing.

    Reference: Roy & Vetterli 2007, applied to the energies.
    """
    return _entropy_rank(np.square(values(spectrum, "energy_entropy_rank")))


def participation_ratio(spectrum: Spectrum) -> float:
    r"""(Σσ²)² / Σσ⁴.

    Example:
        >>> participation_ratio(Spectrum("a", (2, 2), S=[3.0, 3.0]))
        2.0

    Raises:
        TruncatedSpectrumError: some values are missing.

    Reference: Bell & Dean 1970, who divide it by the number of values.
    """
    energy = np.square(_relative(values(spectrum, "participation_ratio")))
    return float(energy.sum() ** 2 / np.square(energy).sum()) if energy.any() else math.nan


def nuclear_rank(spectrum: Spectrum) -> float:
    r"""(Σσ)² / Σσ².

    Example:
        >>> nuclear_rank(Spectrum("a", (2, 2), S=[3.0, 3.0]))
        2.0

    Raises:
        TruncatedSpectrumError: some values are missing.
    """
    S = _relative(values(spectrum, "nuclear_rank"))
    return float(S.sum() ** 2 / np.square(S).sum()) if S.any() else math.nan


def rank_at(spectrum: Spectrum, share: float) -> float:
    r"""The least k with Σ_{i≤k} σ² ≥ share · Σσ².

    Exact under truncation as long as the values that are there reach the share; else refused.

    Args:
        spectrum: the update.
        share: between 0 and 1.

    Example:
        >>> rank_at(Spectrum("a", (2, 2), S=[3.0, 1.0]), 0.9)
        1.0

    Raises:
        TruncatedSpectrumError: the values that are there do not reach the share.

    Reference: Biderman et al. 2024, §4.6 of the published version, reading "variance" as σ².
    """
    if not spectrum.rank:
        return math.nan
    energy = spectrum.cumulative_energies
    goal = share * ((spectrum.norm or 0.0) / spectrum.S[0]) ** 2
    if spectrum.complete:
        goal = min(goal, energy[-1])  # the norm and the sum agree to rounding only
    elif energy[-1] < goal:
        values(spectrum, f"rank_at({share:g})")
    # 4 ulp of slack: a share that is met exactly must not be missed by the rounding of a sum.
    return float(bisect_left(energy, goal * (1 - 1e-15)) + 1)  # numpy's gives the lock away: of thousands that is dear


def _relative(S: np.ndarray) -> np.ndarray:
    return S / S[0] if len(S) and S[0] > 0 else S


def _entropy_rank(weights: np.ndarray) -> float:
    total = weights.sum()
    if not total > 0:
        return math.nan
    p = weights[weights > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
