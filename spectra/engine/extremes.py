"""Updates whose squares leave float64's range, brought into it by a power of two: no digit is lost on the way.

Norms, Gram matrices and checks square the entries, and the check of Σσ⁴ squares that again: beyond 1e77 that overflows,
and below 1e-77 it underflows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from torch import Tensor

from spectra.deltas.forms import Dense, Form, Kronecker, LowRank
from spectra.spectrum import Spectrum, times_power

_LARGEST, _SMALLEST = 1e70, 1e-70  # of ‖ΔW‖_F whose fourth power is far from both ends
_FACTORS = {Dense: ("matrix",), LowRank: ("left", "right"), Kronecker: ("first", "second")}


def within_range(form: Form) -> tuple[Form, int]:
    """The form as 2^e · another whose entries are near 1, and e; itself and 0 where its norm is of a usual size.

    Of a form that is rescaled the rounding edge is left unknown.

    Example:
        >>> import torch
        >>> form, exponent = within_range(Dense(torch.full((1, 1), 2.0**900, dtype=torch.float64)))
        >>> form.norm, exponent
        (0.5, 901)
    """
    names = _FACTORS.get(type(form), ())
    if not names or _SMALLEST < form.norm < _LARGEST or not all(bool(it.isfinite().all()) for it in form.tensors):
        return form, 0
    exponents = [_exponent(tensor) for tensor in form.tensors]
    if None in exponents:  # a factor is zero, and so is ΔW
        return form, 0
    scaled = {name: _shifted(getattr(form, name), -int(e or 0)) for name, e in zip(names, exponents, strict=True)}
    known = {"noise_edge": None, "noise": (), "rounded": None} if isinstance(form, Dense) else {}
    return replace(form, **scaled, **known, base_inner=None), sum(int(e or 0) for e in exponents)  # type: ignore[type-var]


def put_back(spectrum: Spectrum, exponent: int) -> Spectrum:
    """The result of 2^e · ΔW from that of ΔW; without numbers where σ₁ is more, or less, than float64 holds."""
    if not exponent:
        return spectrum
    with np.errstate(over="ignore", under="ignore"):
        S = np.ldexp(spectrum.S, exponent)
    norm = None if spectrum.norm is None else times_power(spectrum.norm, exponent)
    if not np.isfinite(S).all() or (norm is not None and math.isinf(norm)):
        reason = "‖ΔW‖_F is larger than float64 holds"
        return replace(spectrum, status="nonfinite", reason=reason, S=np.zeros(0), U=None, Vh=None, k=0, norm=None)
    if norm == 0 and spectrum.norm:
        reason = "‖ΔW‖_F is smaller than float64 holds, and not zero"
        return replace(spectrum, status="failed", reason=reason, S=np.zeros(0), U=None, Vh=None, k=0, norm=None)
    return replace(spectrum, S=S, norm=norm, resolution=times_power(spectrum.resolution, exponent))


def _exponent(tensor: Tensor) -> int | None:
    """The e of the largest entry's size f · 2^e with ½ ≤ f < 1; None of a tensor of zeros."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return math.frexp(largest)[1] if largest else None


def _shifted(tensor: Tensor, exponent: int) -> Tensor:
    """2^e · tensor, in steps whose factors are in range."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)
