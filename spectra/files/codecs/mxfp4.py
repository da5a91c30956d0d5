"""MXFP4: 4-bit floats (E2M1) in groups of 32 with a power of two per group, as gpt-oss stores its experts.

w = v[code]·2^(scale − 127). `…_blocks` (experts, out, groups, 16) holds two codes to a byte, the low half first, and
`…_scales` (experts, out, groups) the exponents. transformers keeps such a weight as (experts, in, out), under the
name without `_blocks`: so does this. The value is exact in bfloat16, to which the kernels decode.

Reference: OCP Microscaling Formats (MX) v1.0, §5.3.3 (E2M1) and 5.4.1 (E8M0); transformers, integrations/mxfp4.py
(`convert_moe_packed_tensors`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from spectra.errors import SourceError
from spectra.files.codecs.coded import Candidate, Coded, expect, needed
from spectra.files.codecs.packing import row_blocks
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "gpt-oss"
_PART = re.compile(r"_(?:blocks|scales)$")
_GROUP = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127


@dataclass(frozen=True)
class Mxfp4(Coded):
    """A weight, or a stack of experts, in MXFP4.

    Attributes:
        codes: (…, out, whatever holds `in` codes).
        scales: (…, out, groups), the exponents + 127.
        transposed: the weight is (…, in, out), as transformers keeps gpt-oss's experts.
    """

    linear: ClassVar[bool] = False
    scales: TensorRef
    transposed: bool = False

    @property
    def kind(self) -> str:
        """MXFP4."""
        return "MXFP4"

    @property
    def shape(self) -> tuple[int, ...]:
        """(…, out, in), or with the two exchanged."""
        *stack, out, groups = self.scales.shape
        return (*stack, groups * _GROUP, out) if self.transposed else (*stack, out, groups * _GROUP)

    @property
    def dtype(self) -> str:
        """bfloat16, which holds every value but those beyond its range."""
        return "BF16"

    @property
    def companions(self) -> tuple[TensorRef, ...]:
        """The exponents."""
        return (self.scales,)

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """A block of groups at a time."""
        values = torch.tensor(_VALUES, dtype=torch.float32)
        exponents = companions[0].reshape(-1, 1)
        pairs = codes.contiguous().view(torch.uint8).reshape(-1, _GROUP // 2)
        weight = torch.empty((len(pairs), _GROUP), dtype=torch.bfloat16)
        for rows in row_blocks(*weight.shape):
            halves = torch.stack((pairs[rows] & 15, pairs[rows] >> 4), -1).flatten(1)
            weight[rows] = torch.ldexp(values[halves.int()], exponents[rows].int() - _EXPONENT_BIAS)
        *stack, out, groups = companions[0].shape
        weight = weight.reshape(*stack, out, groups * _GROUP)
        return weight.transpose(-2, -1) if self.transposed else weight

    def item(self, index: int) -> Mxfp4 | None:
        """One expert."""
        if len(self.shape) < 3:
            return None
        return replace(self, codes=self.codes.item(index), scales=self.scales.item(index))


def find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[Candidate]:
    """Pairs of `_blocks` and `_scales`, and either that is alone; the config is not needed."""
    stems = {name.rpartition("_")[0] for name, ref in tensors.items() if _PART.search(name) and ref.dtype == "U8"}
    candidates = []
    for stem in sorted(stems):
        parts = {end: tensors[f"{stem}_{end}"] for end in ("blocks", "scales") if f"{stem}_{end}" in tensors}
        names = tuple(f"{stem}_{end}" for end in parts)
        candidates.append(Candidate(stem, TITLE, names, partial(_mxfp4, parts)))
    return candidates


def _mxfp4(parts: Mapping[str, TensorRef]) -> Mxfp4:
    blocks, scales = needed(parts, "blocks"), needed(parts, "scales")
    expect(scales, ("U8",))
    expect(blocks, ("U8",), (*scales.shape, _GROUP // 2))
    if len(scales.shape) != 3 or not scales.numel:
        raise SourceError(f"{scales.name} is {list(scales.shape)}, not one exponent per expert, output and group")
    return Mxfp4(blocks, scales, transposed=True)
