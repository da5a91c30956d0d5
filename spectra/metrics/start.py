"""How much of where training started is left in an update: its energy within directions that were there before."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64

from spectra.errors import SelectionError
from spectra.metrics.similarity import Side
from spectra.spectrum import Spectrum


def span(matrix: Float64[np.ndarray, "d r"]) -> Float64[np.ndarray, "d p"]:
    """An orthonormal basis of what the columns span; no column where all of them are zero.

    Directions below float64's resolution of the largest are left out.

    Example:
        >>> span(np.array([[2.0, 4.0], [0.0, 0.0]])).shape
        (2, 1)
    """
    U, S, _ = np.linalg.svd(matrix, full_matrices=False)
    smallest = max(matrix.shape) * np.finfo(np.float64).eps * (S[0] if len(S) else 0.0)
    return U[:, smallest < S]


def start_share(spectrum: Spectrum, basis: Float64[np.ndarray, "d p"], *, top: int, side: Side = "left") -> float:
    r"""Σ_{i≤k} σᵢ²‖Qᵀuᵢ‖² / Σ_{i≤k} σᵢ²: the share of the energy of an update's top k directions that lies in a span.

    Q is where training started. Chance is p/d, with p directions in ℝᵈ. k is the number of the update's directions
    above storage rounding if that is less (`signal_rank`); without rounding the share is then of the whole update:
    ‖QᵀΔW‖²/‖ΔW‖².

    Args:
        spectrum: the update now, with vectors.
        basis: Q, orthonormal columns.
        top: k.
        side: "left" for u in ℝᵐ, "right" for v in ℝⁿ.

    Raises:
        SelectionError: no vectors are there, or they are of another length.

    Example:
        >>> e = np.eye(2)
        >>> start_share(Spectrum("w", (2, 2), S=[2.0, 1.0], U=e, Vh=e), e[:, :1], top=2)
        0.8
    """
    if spectrum.U is None or spectrum.Vh is None:
        raise SelectionError(f"{spectrum.name} has no vectors to compare with the start")
    k = min(top, spectrum.k, spectrum.signal_rank)
    vectors = (spectrum.U if side == "left" else spectrum.Vh.T)[:, :k]
    if vectors.shape[0] != basis.shape[0]:
        raise SelectionError(
            f"{spectrum.name} has {vectors.shape[0]} entries on the {side}, the start {basis.shape[0]}"
        )
    if not k:
        return math.nan
    energy = np.square(spectrum.S[:k] / spectrum.S[0])
    within = np.square(basis.T @ vectors).sum(0)
    return float(min((energy * within).sum() / energy.sum(), 1.0))
