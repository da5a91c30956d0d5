"""How far a few directions dominate an update: shares, inequality and norms."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from spectra.metrics.rank import values
from spectra.spectrum import Spectrum


def top_k_share(spectrum: Spectrum, k: int) -> float:
    r"""Σ_{i≤k} σ² / Σσ², the share of the update's energy in its top k directions.

    Exact under truncation while k values are there, since the norm is of the whole ΔW.

    Example:
        >>> round(top_k_share(Spectrum("a", (2, 2), S=[3.0, 1.0]), 1), 12)
        0.9

    Raises:
        TruncatedSpectrumError: fewer than k values are there and the rest are not known to be zero.

    Reference: Wang et al. 2023, abstract ("dominance of top singular vectors"), made a number.
    """
    if not spectrum.rank:
        return math.nan
    if len(spectrum.S) < k:
        values(spectrum, f"top_{k}_share")
    share = spectrum.relative_energies[:k].sum() / ((spectrum.norm or 0.0) / spectrum.S[0]) ** 2
    return float(min(share, 1.0))


def top_value_share(spectrum: Spectrum) -> float:
    r"""σ₁ / Σσ.

    Example:
        >>> top_value_share(Spectrum("a", (2, 2), S=[3.0, 1.0]))
        0.75

    Raises:
        TruncatedSpectrumError: some values are missing.
    """
    S = values(spectrum, "top_value_share")
    return float(S[0] / S.sum()) if S.any() else math.nan


def gini(spectrum: Spectrum) -> float:
    r"""Gini coefficient of the max_rank values σ: 0 if all are equal, towards 1 if one holds everything.

    G = Σᵢ (2i − n − 1) σ₍ᵢ₎ / (n Σσ), σ₍ᵢ₎ ascending, n = max_rank; a LoRA of rank r is thus measured
    among its r values. Between updates of different rank compare `gini_all`.

    Example:
        >>> gini(Spectrum("a", (2, 2), S=[1.0, 0.0]))
        0.5

    Raises:
        TruncatedSpectrumError: some values are missing.

    Reference: Dixon et al. 1987, without their factor n/(n − 1).
    """
    S = np.sort(values(spectrum, "gini")[: spectrum.max_rank])
    if not S.any():
        return math.nan
    return float((places(len(S)) * S).sum() / (len(S) * S.sum()))


@lru_cache(64)  # thousands of matrices have few sizes
def places(n: int) -> np.ndarray:
    """2i − n − 1 for i = 1 … n."""
    return 2 * np.arange(1, n + 1) - n - 1


def gini_all(spectrum: Spectrum) -> float:
    r"""Gini coefficient of all min(out, in) values σ, those that the rank does not allow included as zeros.

    1 − (max_rank/min(out, in))·(1 − G) with G of `gini`: one convention for a LoRA and a full update side by side.

    Example:
        >>> lora, full = Spectrum("a", (4, 4), S=[1.0, 1.0], max_rank=2), Spectrum("a", (4, 4), S=[1.0, 1.0, 0, 0])
        >>> gini(lora), gini_all(lora), gini_all(full)
        (0.0, 0.5, 0.5)

    Raises:
        TruncatedSpectrumError: some values are missing.

    Reference: as for `gini`.
    """
    among = gini(spectrum)  # NaN where there is no value
    return 1 - (spectrum.max_rank or 0) / min(spectrum.shape) * (1 - among) if spectrum.rank else math.nan


def spectral_norm(spectrum: Spectrum) -> float:
    """‖ΔW‖₂ = σ₁.

    Example:
        >>> spectral_norm(Spectrum("a", (2, 2), S=[4.0, 3.0]))
        4.0
    """
    return float(spectrum.S[0]) if len(spectrum.S) else math.nan


def frobenius_norm(spectrum: Spectrum) -> float:
    """‖ΔW‖_F of the whole update.

    Example:
        >>> frobenius_norm(Spectrum("a", (2, 2), S=[4.0, 3.0]))
        5.0
    """
    return math.nan if spectrum.norm is None else spectrum.norm


def relative_norm(spectrum: Spectrum) -> float:
    """‖ΔW‖_F / ‖W₀‖_F, or NaN where the base was not read.

    Example:
        >>> relative_norm(Spectrum("a", (2, 2), S=[4.0, 3.0], base_norm=10.0))
        0.5
    """
    if spectrum.norm is None or not spectrum.base_norm:
        return math.nan
    return spectrum.norm / spectrum.base_norm
