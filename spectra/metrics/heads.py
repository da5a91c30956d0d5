"""Are the heads of a multi-head LoRA alike? Cosines of their matrices and of the updates that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.deltas.forms import LowRank


def head_cosines(heads: Sequence[Float64[Tensor, "out r"]]) -> list[list[float]]:
    """⟨B_s, B_t⟩/(‖B_s‖‖B_t‖) of every two heads, each flattened; NaN beside a head that is zero.

    It is not invariant under (A, B) → (RA, BR⁻¹), so it compares heads that share one A; `update_cosines` is.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> head_cosines([eye, -2 * eye, eye[[1, 0]]])
        [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    Reference: Liu et al. 2025 (R-LoRA), the diagnostic of its heads; Tian et al. 2024 (HydraLoRA).
    """
    flat = torch.stack([head.flatten() for head in heads])
    return _cosines(flat @ flat.mT)


def update_cosines(updates: Sequence[LowRank]) -> list[list[float]]:
    """⟨Δ_s, Δ_t⟩/(‖Δ_s‖‖Δ_t‖) of the heads' own updates Δ_k = s·B_k·A, from their factors: Σ (B_sᵀB_t)∘(A_s·A_tᵀ).

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> update_cosines([LowRank(eye, eye), LowRank(2 * eye[:, :1], -eye[:1])])[0][1]  # -1/√2
        -0.70710678...
    """
    inner = [[float(((s.left.mT @ t.left) * (s.right @ t.right.mT)).sum()) for t in updates] for s in updates]
    return _cosines(torch.tensor(inner, dtype=torch.float64))


def mean_pairwise(square: Sequence[Sequence[float]]) -> float:
    """The mean over the pairs that have a value; NaN where none has.

    Example:
        >>> mean_pairwise([[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]])
        0.3
    """
    pairs = [square[s][t] for s, t in combinations(range(len(square)), 2)]
    known = [value for value in pairs if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _cosines(inner: Float64[Tensor, "N N"]) -> list[list[float]]:
    """Inner products over the lengths on their diagonal."""
    squares = inner.diagonal()
    clamped = (inner / torch.outer(squares, squares).sqrt()).clamp(
        -1.0, 1.0
    )  # 0/0 is NaN; squares multiplied: ±1 exactly
    rows: list[list[float]] = clamped.tolist()
    return rows
