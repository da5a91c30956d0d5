"""GPTQ: integer codes in groups of inputs, in the layout that AutoGPTQ and GPTQModel write.

w[o, i] = s[g, o]·(q[i, o] − z[g, o]) with g = g_idx[i], so that any order of the inputs (`desc_act`) is read.
`qweight` (in·bits/32, out) packs the codes down the columns, `qzeros` (groups, out·bits/32) the zero points along
the rows, both as one stream of bits from the low ones on; 3 bits run over the words' ends. The first version of
the format ("gptq") stores z − 1 modulo 2^bits, "gptq_v2" stores z.

The product is rounded once to the scales' type: kernels that compute in it agree on that weight.

Reference: Frantar et al. 2023 (GPTQ); AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py (`pack`, `forward`);
GPTQModel, nn_modules/qlinear/__init__.py (`dequantize_weight`), utils/model_dequant.py (`_shift_gptq_qzeros`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.errors import SourceError
from spectra.files.codecs.coded import Candidate, Coded, expect, full_names, modules, needed, settings_of
from spectra.files.codecs.packing import group_numbers, row_blocks, scaled, unpacked
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PARTS = "qweight|qzeros|scales|g_idx|perm|workspace"
SCALES = ("F16", "BF16", "F32")
_BITS = (2, 3, 4, 8)
_ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class Gptq(Coded):
    """A Linear layer's weight in GPTQ's layout.

    Attributes:
        codes: qweight, (in·bits/32, out).
        zeros: qzeros, (groups, out·bits/32).
        scales: (groups, out).
        of_input: g_idx, (in,); without it the groups are as they come, which is so without `desc_act` only.
        bits: of a code.
        offset: what a stored zero point lacks.
    """

    zeros: TensorRef
    scales: TensorRef
    of_input: TensorRef | None
    bits: int
    offset: int
    group_size: int

    @property
    def kind(self) -> str:
        """Such as INT4."""
        return f"INT{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.codes.shape[1], self.codes.shape[0] * 32 // self.bits)

    @property
    def dtype(self) -> str:
        """That of the scales."""
        return self.scales.dtype

    @property
    def companions(self) -> tuple[TensorRef, ...]:
        """Zero points, scales and the groups' order."""
        return (self.zeros, self.scales, self.of_input) if self.of_input else (self.zeros, self.scales)

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """A block of outputs at a time."""
        zeros, scales = companions[:2]
        out, inputs = self.shape
        points = (unpacked(zeros, self.bits) + self.offset) & (2**self.bits - 1)
        if self.of_input is not None:
            groups = group_numbers(self.of_input, companions[2], len(scales))
        else:
            groups = torch.arange(inputs) // self.group_size
        weight = torch.empty(self.shape, dtype=scales.dtype)
        for rows in row_blocks(out, inputs):
            weight[rows] = scaled(
                unpacked(codes[:, rows].T, self.bits), points[:, rows].T[:, groups], scales[:, rows].T[:, groups]
            )
        return weight


def find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[Candidate]:
    """Modules with a `qweight`, unless the config says that they are AWQ's."""
    settings = settings_of(config)
    method = str(settings.get("quant_method", "")).lower()
    if method == "awq":
        return []
    title = {"gptq": "GPTQ", "": "GPTQ or AWQ"}.get(method, method.upper())
    return [
        Candidate(f"{module}.weight", title, full_names(module, parts, "qweight"), partial(_gptq, parts, settings))
        for module, parts in modules(tensors, PARTS, "qweight|qzeros").items()
    ]


def _gptq(parts: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> Gptq:
    method = str(settings.get("quant_method", "")).lower()
    if not method:
        raise SourceError(
            "no quantization_config in config.json and no quantize_config.json says which: put it beside the weights"
        )
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if method != "gptq" or layout not in _ZERO_OFFSET:
        raise SourceError(f"the layout {layout!r} of {method!r} is not known here: pass the weights in bf16 or fp16")
    codes, zeros, scales = (needed(parts, part) for part in ("qweight", "qzeros", "scales"))
    for ref in (codes, zeros):
        expect(ref, ("I32", "U32"))
    expect(scales, SCALES)
    if any(len(ref.shape) != 2 for ref in (codes, zeros, scales)) or not codes.numel or not scales.numel:
        raise SourceError(f"{codes.name} is {list(codes.shape)}, which is no matrix of codes")
    groups, out = scales.shape
    bits = 32 * zeros.shape[1] // out
    if bits not in _BITS or 32 * zeros.shape[1] != bits * out or 32 * codes.shape[0] % bits:
        raise SourceError(f"{zeros.name} {list(zeros.shape)} and {scales.name} {list(scales.shape)} do not fit")
    inputs = 32 * codes.shape[0] // bits
    if inputs % 8 or out % 8:
        raise SourceError(f"{inputs} inputs and {out} outputs do not fill whole words of {bits}-bit codes")
    expect(codes, ("I32", "U32"), (codes.shape[0], out))
    expect(zeros, ("I32", "U32"), (groups, zeros.shape[1]))
    of_input = parts.get("g_idx")
    size = _group_size(settings, inputs)
    if of_input is not None:
        expect(of_input, ("I32", "I64"), (inputs,))
    elif settings.get("desc_act") is not False or groups != -(-inputs // size):
        raise SourceError(f"there is no g_idx that says which of {groups} groups each of {inputs} inputs belongs to")
    return Gptq(codes, zeros, scales, of_input, bits, _ZERO_OFFSET[layout], size)


def _group_size(settings: Mapping[str, Any], inputs: int) -> int:
    """The inputs of one group; all of them for −1."""
    given = settings.get("group_size", -1)
    return given if type(given) is int and given > 0 else max(1, inputs)
