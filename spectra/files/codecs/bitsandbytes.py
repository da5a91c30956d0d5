"""bitsandbytes: NF4 and FP4 with their block maxima, nested or not, and int8 with its row maxima.

4 bits: w = t[code]·absmax[i // blocksize] over the flattened weight, two codes to a byte, the high half first;
t are the sixteen values of the type. absmax is float32, or itself 8-bit codes: absmax[b] =
t₂[code]·nested_absmax[b // 256] + offset. What is not a tensor stands as JSON in `quant_state.bitsandbytes__nf4`.
8 bits: w = code·SCB[row]/127.

The 4-bit product is formed in float32 and rounded to the type that the file names, as `dequantize_4bit` does it:
that is the weight of the forward pass and of a merge. The int8 one is float32, as in `int8_vectorwise_dequant`.

Reference: Dettmers et al. 2023 (QLoRA), §3; bitsandbytes 0.50, functional.py (`QuantState`, `dequantize_4bit`,
`int8_vectorwise_dequant`), backends/default/ops.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.errors import SourceError
from spectra.files.codecs.coded import Candidate, Coded, contents, expect, full_names, modules, needed
from spectra.files.codecs.packing import BLOCK_ENTRIES, row_blocks
from spectra.files.dtypes import DTYPE_OF_TORCH, DTYPES
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "bitsandbytes"
# The kernels know these and do not look at the stored map. NF4: quantiles of a normal distribution.
_VALUES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4,
        0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4,
    ),
}  # fmt: skip
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STORAGE = ("U8", "I8", "F16", "BF16", "F32")  # what `bnb_4bit_quant_storage` may call the bytes
_PARTS_4 = r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+"
_STATE = r"quant_state\.bitsandbytes__(?:nf4|fp4)"
_PER_127 = 7.874015718698502e-3  # the library's 1/127


@dataclass(frozen=True)
class Nested:
    """How the block maxima are themselves coded.

    Attributes:
        absmax: the maxima of their blocks.
        values: the 256 values of their codes.
        blocksize: how many share one maximum.
        offset: what is added to all.
    """

    absmax: TensorRef
    values: TensorRef
    blocksize: int
    offset: float


@dataclass(frozen=True)
class FourBit(Coded):
    """NF4 or FP4.

    Attributes:
        codes: two to a byte, in whatever type the bytes are stored.
        absmax: one per block, float or 8-bit codes.
        nested: how the latter are read.
        quant_type: "nf4" or "fp4".
        blocksize: entries of the flattened weight that share a maximum.
        decoded: the weight's shape.
        rounded: the type that it is rounded to.
    """

    absmax: TensorRef
    nested: Nested | None
    quant_type: str
    blocksize: int
    decoded: tuple[int, ...]
    rounded: str

    @property
    def kind(self) -> str:
        """NF4 or FP4."""
        return self.quant_type.upper()

    @property
    def shape(self) -> tuple[int, ...]:
        """As the quantisation state says it."""
        return self.decoded

    @property
    def dtype(self) -> str:
        """The type of the weight that was quantised."""
        return self.rounded

    @property
    def companions(self) -> tuple[TensorRef, ...]:
        """The maxima, and what they are decoded with."""
        return (self.absmax, self.nested.absmax, self.nested.values) if self.nested else (self.absmax,)

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """Values times maxima in float32, rounded once."""
        absmax = self._maxima(companions)
        bytes_ = codes.contiguous().view(torch.uint8).flatten()
        values = torch.tensor(_VALUES[self.quant_type], dtype=torch.float32)
        weight = torch.empty(math.prod(self.shape), dtype=getattr(torch, DTYPES[self.rounded][0]))
        for start in range(0, weight.numel(), BLOCK_ENTRIES):
            part = weight[start : start + BLOCK_ENTRIES]
            pairs = bytes_[start // 2 : (start + part.numel() + 1) // 2]
            halves = torch.stack((pairs >> 4, pairs & 15), -1).flatten()[: part.numel()]
            maxima = absmax[start // self.blocksize : -(-(start + part.numel()) // self.blocksize)]
            part.copy_(values[halves.int()].mul_(maxima.repeat_interleave(self.blocksize)[: part.numel()]))
        return weight.reshape(self.shape)

    def _maxima(self, companions: Sequence[Tensor]) -> Tensor:
        if self.nested is None:
            return companions[0].flatten().to(torch.float32)
        codes, absmax, values = (tensor.flatten() for tensor in companions)
        shared = absmax.to(torch.float32).repeat_interleave(self.nested.blocksize)[: codes.numel()]
        return values.to(torch.float32)[codes.int()].mul_(shared).add_(self.nested.offset)


@dataclass(frozen=True)
class EightBit(Coded):
    """int8 with one maximum per row.

    Attributes:
        codes: (out, in) in int8.
        row_maxima: SCB, (out,).
    """

    row_maxima: TensorRef

    @property
    def kind(self) -> str:
        """INT8."""
        return "INT8"

    @property
    def shape(self) -> tuple[int, ...]:
        """As the codes are stored."""
        return self.codes.shape

    @property
    def dtype(self) -> str:
        """As the library decodes them."""
        return "F32"

    @property
    def companions(self) -> tuple[TensorRef, ...]:
        """The maxima."""
        return (self.row_maxima,)

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """Codes times maxima over 127."""
        maxima = companions[0].to(torch.float32).reshape(-1, 1)
        weight = torch.empty(self.shape, dtype=torch.float32)
        for rows in row_blocks(*self.shape):
            torch.mul(codes[rows], maxima[rows], out=weight[rows]).mul_(_PER_127)
        return weight

    def rows(self, start: int, stop: int) -> EightBit:
        """Rows with their maxima."""
        return replace(self, codes=self.codes.rows(start, stop), row_maxima=self.row_maxima.rows(start, stop))


def find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[Candidate]:
    """Weights with block maxima, and int8 weights with SCB; the config is not needed."""
    candidates = []
    for weight, parts in modules(tensors, _PARTS_4, rf"absmax|{_STATE}").items():
        codes = {weight: tensors[weight]} if weight in tensors else {}
        names = (*codes, *full_names(weight, parts, "absmax"))
        candidates.append(
            Candidate(weight, f"{TITLE} 4-bit", names, partial(_four_bit, weight, codes.get(weight), parts))
        )
    for module, parts in modules(tensors, "weight|SCB|weight_format", "SCB|weight_format").items():
        names = full_names(module, parts, "weight")
        candidates.append(Candidate(f"{module}.weight", f"{TITLE} 8-bit", names, partial(_eight_bit, parts)))
    return candidates


def _eight_bit(parts: Mapping[str, TensorRef]) -> EightBit:
    codes, maxima = needed(parts, "weight"), needed(parts, "SCB")
    expect(codes, ("I8",))
    if len(codes.shape) != 2:
        raise SourceError(f"{codes.name} has {len(codes.shape)} axes, where int8 codes have two")
    expect(maxima, ("F32", "F16", "BF16"), (codes.shape[0],))
    if "weight_format" in parts and any(contents(parts["weight_format"])):
        raise SourceError("they are tiled for one kind of GPU: save them again with a present bitsandbytes")
    return EightBit(codes, maxima)


def _four_bit(weight: str, codes: TensorRef | None, parts: Mapping[str, TensorRef]) -> FourBit:
    if codes is None:
        raise SourceError(f"{weight} itself is not in the file; download or save it again")
    expect(codes, _STORAGE)
    states = [part for part in parts if part.startswith("quant_state.")]
    if len(states) != 1:
        raise SourceError(f"there are {len(states)} quant_state tensors beside them, where one says how to read them")
    needed(parts, "quant_map")
    absmax = needed(parts, "absmax")
    state = _state(parts[states[0]])
    quant_type, shape, dtype = state.get("quant_type"), state.get("shape"), state.get("dtype")
    if not isinstance(quant_type, str) or quant_type not in _VALUES:
        raise SourceError(f"their quant_type is {quant_type!r}, not nf4 or fp4")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise SourceError(f"their quant_state says the shape {shape!r}, which is none")
    rounded = DTYPE_OF_TORCH.get(dtype, "") if isinstance(dtype, str) else ""
    if rounded not in ("F32", "F16", "BF16"):
        raise SourceError(f"their quant_state says the type {dtype!r}, not float32, float16 or bfloat16")
    if not codes.nbytes or codes.nbytes != -(-math.prod(shape) // 2):
        raise SourceError(f"{codes.nbytes} bytes of 4-bit codes are not the shape {shape} that their quant_state says")
    blocksize = _block_size(state, "blocksize")
    nested = _nested(state, parts, absmax) if "nested_absmax" in parts or absmax.dtype == "U8" else None
    blocks = -(-math.prod(shape) // blocksize)
    if absmax.numel != blocks or absmax.dtype not in (("U8",) if nested else ("F32", "F16", "BF16")):
        raise SourceError(f"{absmax.name} is {list(absmax.shape)} in {absmax.dtype}, not {blocks} maxima")
    return FourBit(codes, absmax, nested, quant_type, blocksize, tuple(shape), rounded)


def _nested(state: Mapping[str, Any], parts: Mapping[str, TensorRef], absmax: TensorRef) -> Nested:
    maxima, values = needed(parts, "nested_absmax"), needed(parts, "nested_quant_map")
    blocksize, offset = _block_size(state, "nested_blocksize"), state.get("nested_offset")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not math.isfinite(offset):
        raise SourceError(f"their quant_state says nested_offset = {offset!r}, which is no number")
    expect(maxima, ("F32", "F16", "BF16"), (-(-absmax.numel // blocksize),))
    expect(values, ("F32", "F16", "BF16"), (256,))
    return Nested(maxima, values, blocksize, float(offset))


def _block_size(state: Mapping[str, Any], key: str) -> int:
    size = state.get(key)
    if type(size) is not int or size not in _BLOCK_SIZES:
        raise SourceError(f"their quant_state says {key} = {size!r}, not one of {', '.join(map(str, _BLOCK_SIZES))}")
    return size


def _state(ref: TensorRef) -> Mapping[str, Any]:
    """The JSON of a quantisation state: a few hundred bytes, which are part of the header in all but name."""
    expect(ref, ("U8",))
    try:
        state = json.loads(contents(ref))
    except (ValueError, RecursionError):
        raise SourceError(f"{ref.name} is not JSON; download or save it again") from None
    if not isinstance(state, dict):
        raise SourceError(f"{ref.name} is not a JSON object; download or save it again")
    return state
