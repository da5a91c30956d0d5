"""What every result has to pass before it is reported: values against ‖ΔW‖_F, vectors against ΔW itself."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.deltas.forms import Form
from spectra.deltas.thin import times

FROBENIUS_BOUND = 1e-9  # on |Σσ² − ‖ΔW‖²| / ‖ΔW‖², and the same of σ⁴; float64 solvers stay below 1e-12
_SMALLEST = 1e-280  # below it, fourth powers have lost digits
VECTOR_BOUND = 1e-6  # on ‖ΔW v − σu‖ and ‖ΔWᵀu − σv‖ relative to σ₁, root mean square, where σ is resolved
ORTHONORMAL_BOUND = 1e-9  # on the entries of UᵀU − I and VᵀV − I


def value_fault(
    S: Float64[Tensor, " s"],
    norm: float,
    floor: float,
    complete: bool = True,
    *,
    fourth: tuple[float, float] | None = None,
    count: int | None = None,
) -> str:
    """What is wrong with singular values; "" for nothing.

    Σσ² = ‖ΔW‖² alone passes whatever keeps the sum, such as a σ₁ too large beside a σ₂ too small; Σσ⁴ = ‖ΔW·ΔWᵀ‖²
    does not: where two values are wrong, both sums cannot be right.

    Args:
        S: the values.
        norm: ‖ΔW‖_F, computed from the form and not from the values.
        floor: rounding error of ΔW itself, absolute.
        complete: whether S should hold all values; if not, Σσ² may only fall short of ‖ΔW‖².
        fourth: ‖ΔW·ΔWᵀ‖_F² and what it may be off by, computed without the values; None where it is not known.
        count: how many values there have to be; None for any number.

    Example:
        >>> value_fault(torch.tensor([4.0, 3.0]).double(), 5.0, 0.0)
        ''
        >>> value_fault(torch.tensor([4.0, 3.5]).double(), 5.0, 0.0)
        'Σσ² = 2.825000000000e+01 is not ‖ΔW‖² = 2.500000000000e+01'
    """
    values = S.cpu().numpy()
    if not np.isfinite(values).all():
        return "values that are not finite"
    if (values < 0).any() or (values[1:] > values[:-1]).any():
        return "values that are negative or not descending"
    if count is not None and len(values) != count:
        return f"{len(values)} values where there are {count}"
    with np.errstate(over="ignore"):
        total, fourths = float(np.square(values).sum()), float(np.square(np.square(values)).sum())
    excess = total - norm**2
    if (abs(excess) if complete else excess) > FROBENIUS_BOUND * norm**2 + 2 * floor * norm:
        return f"Σσ² = {total:.12e} is not ‖ΔW‖² = {norm**2:.12e}"
    if fourth is None or not _SMALLEST < fourth[0] < math.inf:
        return ""
    total, (expected, uncertain) = fourths, fourth
    excess = total - expected
    if (abs(excess) if complete else excess) > FROBENIUS_BOUND * expected + uncertain + 4 * floor * norm**3:
        return f"Σσ⁴ = {total:.12e} is not ‖ΔW·ΔWᵀ‖² = {expected:.12e}"
    return ""


def vector_fault(form: Form, S: Tensor, U: Tensor, Vh: Tensor, resolution: float) -> str:
    """What is wrong with singular vectors; "" for nothing.

    Args:
        form: ΔW.
        S: singular values, at least k of them.
        U: (m, k).
        Vh: (k, n).
        resolution: vectors of values at or below it, absolute, are only checked for orthonormality.
    """
    eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    skew = max(float((U.mT @ U - eye).abs().max()), float((Vh @ Vh.mT - eye).abs().max()))
    if not skew <= ORTHONORMAL_BOUND:  # also where it is NaN
        return f"vectors that are not orthonormal by {skew:.1e}"
    kept = min(int((resolution < S).sum()), U.shape[1])
    s, u, vh = S[:kept], U[:, :kept], Vh[:kept]
    mix = _signs(kept, S)
    right = form.times(times(vh.mT, mix)) - times(u, s[:, None] * mix)
    left = form.T.times(times(u, mix)) - times(vh.mT, s[:, None] * mix)
    worst = max(float(right.norm()), float(left.norm())) if kept else 0.0
    if not worst <= max(VECTOR_BOUND * float(S[0]), resolution) * math.sqrt(max(kept, 1)):
        return f"a residual of {worst / float(S[0]):.1e}·σ₁ in the vectors"
    return ""


def _signs(count: int, like: Tensor) -> Tensor:
    """Two random ± combinations of the vectors: a fault in any one of them shows, at a fraction of the cost."""
    generator = torch.Generator().manual_seed(count)
    signs = torch.randint(0, 2, (count, 2), generator=generator) * 2 - 1
    return signs.to(device=like.device, dtype=like.dtype)
