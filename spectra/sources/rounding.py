"""The storage-rounding floor: the singular values that rounding to bf16, fp16 or fp32 alone would give."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Bits after the leading one, and the exponent of the smallest normal number.
_FORMATS = {"F64": (52, -1022), "F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}


def rounding_edge(stored: Tensor, dtype: str) -> float | None:
    r"""The edge of the hump that rounding leaves in the spectrum of stored − exact.

    Rounding to nearest leaves an error of variance ulp²/12 in each entry, nearly independent; the
    largest singular value of such an (m, n) matrix is √(mean ulp²/12) · (√m + √n).

    Args:
        stored: the tuned weights as stored, (out, in), upcast.
        dtype: their storage type, "BF16", "F16", "F32" or "F64".

    Returns:
        The edge in the units of σ, or None for a type without a known rounding or an empty matrix.

    Example:
        >>> import torch
        >>> round(rounding_edge(torch.ones(4, 4), "BF16") / (2**-7 / 12**0.5 * 4), 12)
        1.0

    Reference: Marchenko & Pastur 1967 for the edge; uniform rounding error, Widrow & Kollár 2008, ch. 3.
    """
    import torch

    if dtype not in _FORMATS or stored.numel() == 0:
        return None
    bits, lowest = _FORMATS[dtype]
    exponent = torch.frexp(stored).exponent - 1
    ulp = torch.ldexp(torch.ones_like(stored), exponent.clamp(min=lowest) - bits)
    rows, columns = stored.shape[0], stored.shape[1]
    edge = math.sqrt(float(ulp.square().mean()) / 12) * (math.sqrt(rows) + math.sqrt(columns))
    return edge if math.isfinite(edge) else None
