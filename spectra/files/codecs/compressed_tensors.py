"""compressed-tensors (llm-compressor): integer codes packed into int32, or int8 as they are.

w = (q − z)·s with one scale per row, or per group of inputs in each row. `weight_packed` (out, in·bits/32) is one
stream of bits per row that holds q + 2^(bits−1); `weight_zero_point`, where there is one, is packed alike down the
columns; `weight_g_idx` names the group of each input. Only 4 and 8 bits are read: for others, releases of the
library pack differently.

The product is rounded once to the scale's type, as `dequantize` does it.

Reference: compressed-tensors 0.20, compressors/pack_quantized/helpers.py (`unpack_from_int32`),
compressors/naive_quantized/base.py, quantization/lifecycle/forward.py (`dequantize`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.errors import SourceError
from spectra.files.codecs import fp8
from spectra.files.codecs.coded import Candidate, Coded, contents, expect, full_names, modules, needed, settings_of
from spectra.files.codecs.packing import group_numbers, row_blocks, scaled, unpacked
from spectra.files.dtypes import REAL_FLOATS
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "compressed-tensors"
_FLOATS = (*REAL_FLOATS, *fp8.DTYPES)  # weights that are not integer codes, whatever stands beside them
_SCALES = ("F16", "BF16", "F32")
_PACKED = r"weight_packed|weight_(?:shape|scale|zero_point|g_idx|global_scale)|input_(?:scale|zero_point|global_scale)"
_PLAIN = r"weight|weight_(?:scale|zero_point)|input_(?:scale|zero_point)"


@dataclass(frozen=True)
class CompressedTensors(Coded):
    """A weight in integer codes.

    Attributes:
        codes: weight_packed (out, in·bits/32), or the weight (out, in) in int8.
        scales: (out, groups).
        zeros: (out·bits/32, groups) in int32, or (out, groups) in int8; None where codes are symmetric.
        of_input: the group of each input, (in,); without it the groups are as they come.
        bits: of a code.
        inputs: how many columns the weight has.
    """

    scales: TensorRef
    zeros: TensorRef | None
    of_input: TensorRef | None
    bits: int
    inputs: int

    @property
    def kind(self) -> str:
        """Such as INT4."""
        return f"INT{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.codes.shape[0], self.inputs)

    @property
    def dtype(self) -> str:
        """That of the scales."""
        return self.scales.dtype

    @property
    def companions(self) -> tuple[TensorRef, ...]:
        """Scales, zero points and the groups' order."""
        return (self.scales, *(ref for ref in (self.zeros, self.of_input) if ref is not None))

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """A block of rows at a time."""
        out, inputs = self.shape
        scales, others = companions[0].reshape(out, -1), list(companions[1:])
        zeros = self._plain(others.pop(0), out) if self.zeros is not None else torch.zeros((), dtype=torch.int16)
        if self.of_input is not None:
            groups = group_numbers(self.of_input, others.pop(), scales.shape[1])
        else:
            groups = torch.arange(inputs) // (inputs // scales.shape[1])
        weight = torch.empty(self.shape, dtype=scales.dtype)
        for rows in row_blocks(out, inputs):
            points = zeros[rows][:, groups] if self.zeros is not None else zeros
            weight[rows] = scaled(self._signed(codes[rows])[:, :inputs], points, scales[rows][:, groups])
        return weight

    def _plain(self, zeros: Tensor, out: int) -> Tensor:
        """The zero points as (out, groups)."""
        return self._signed(zeros.T)[:, :out].T if self.zeros is not None and self.zeros.dtype == "I32" else zeros

    def _signed(self, codes: Tensor) -> Tensor:
        """Packed codes along the last axis as signed numbers; int8 as it is."""
        if codes.dtype == torch.int8:
            return codes
        return unpacked(codes, self.bits).to(torch.int16) - 2 ** (self.bits - 1)


def find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[Candidate]:
    """Modules with `weight_packed`, and int8 weights where the config says whose they are."""
    settings = settings_of(config)
    candidates = []
    for module, parts in modules(tensors, _PACKED, "weight_packed|weight_shape").items():
        names = full_names(module, parts, "weight_packed")
        candidates.append(Candidate(f"{module}.weight", TITLE, names, partial(_packed, parts, settings)))
    if settings.get("quant_method") != TITLE:
        return candidates
    for module, parts in modules(tensors, _PLAIN, "weight|weight_scale").items():
        if "weight" not in parts or parts["weight"].dtype not in _FLOATS:
            names = full_names(module, parts, "weight")
            candidates.append(Candidate(f"{module}.weight", TITLE, names, partial(_plain, parts, settings)))
    return candidates


def _packed(parts: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> CompressedTensors:
    codes, shape = needed(parts, "weight_packed"), needed(parts, "weight_shape")
    expect(codes, ("I32",))
    expect(shape, ("I64", "I32"), (2,))
    width, content = shape.nbytes // 2, contents(shape)
    out, inputs = (int.from_bytes(content[start : start + width], "little", signed=True) for start in (0, width))
    if len(codes.shape) != 2 or out < 1 or inputs < 1 or codes.shape[0] != out:
        raise SourceError(f"{codes.name} is {list(codes.shape)}, and weight_shape says [{out}, {inputs}]")
    bits = [bits for bits in (4, 8) if -(-inputs * bits // 32) == codes.shape[1]]
    if len(bits) != 1:
        raise SourceError(f"{codes.name} {list(codes.shape)} is not {inputs} inputs in 4 or 8 bits")
    return _with_scales(codes, bits[0], inputs, parts, settings)


def _plain(parts: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> CompressedTensors:
    codes = needed(parts, "weight")
    expect(codes, ("I8",))
    if len(codes.shape) != 2 or not codes.numel:
        raise SourceError(f"{codes.name} is {list(codes.shape)}, which is no matrix of codes")
    return _with_scales(codes, 8, codes.shape[1], parts, settings)


def _with_scales(
    codes: TensorRef, bits: int, inputs: int, parts: Mapping[str, TensorRef], settings: Mapping[str, Any]
) -> CompressedTensors:
    """Codes with their scales, zero points and group numbers, if these fit them."""
    out = codes.shape[0]
    scales, zeros, of_input = needed(parts, "weight_scale"), parts.get("weight_zero_point"), parts.get("weight_g_idx")
    expect(scales, _SCALES)
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    if scales.shape != (out, groups) or not groups or inputs % groups:
        raise SourceError(f"{scales.name} {list(scales.shape)} is no scale per row or group of [{out}, {inputs}]")
    if zeros is None and _says(settings, "symmetric", False):
        raise SourceError("config.json says that they have zero points, and weight_zero_point is not in the file")
    if zeros is not None:
        stored = ("I8", out) if codes.dtype == "I8" else ("I32", -(-out * bits // 32))
        expect(zeros, stored[:1], (stored[1], groups))
    if of_input is None and _says(settings, "actorder", True, "group", "dynamic"):
        raise SourceError("config.json says that groups are in another order, and weight_g_idx is not in the file")
    if of_input is not None:
        expect(of_input, ("I32", "I64"), (inputs,))
    return CompressedTensors(codes, scales, zeros, of_input, bits, inputs)


def _says(settings: Mapping[str, Any], key: str, *answers: object) -> bool:
    """Whether any group of layers has one of these answers to a question about its weights."""
    groups = settings.get("config_groups")
    layers = groups.values() if isinstance(groups, Mapping) else ()
    weights = [layer.get("weights") for layer in layers if isinstance(layer, Mapping)]
    return any(isinstance(entry, Mapping) and entry.get(key) in answers for entry in weights)
