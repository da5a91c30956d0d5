"""AWQ in AutoAWQ's "gemm" layout: 4-bit codes along the outputs, eight to a word in an order of their own.

w[o, i] = s[g, o]·(q[i, o] − z[g, o]) with g = i // group_size. `qweight` (in, out/8) and `qzeros` (groups, out/8)
hold outputs 0 2 4 6 1 3 5 7 of every eight from the low bits on.

The product is rounded once to the scales' type, as `dequantize_gemm` and the kernels compute it.

Reference: Lin et al. 2024 (AWQ); AutoAWQ, awq/utils/packing_utils.py (`dequantize_gemm`), awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.errors import SourceError
from spectra.files.codecs.coded import Candidate, Coded, expect, full_names, modules, needed, settings_of
from spectra.files.codecs.gptq import PARTS, SCALES
from spectra.files.codecs.packing import row_blocks, scaled, unpacked
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BITS, _PER_WORD = 4, 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in which place of a word each of its eight outputs is


@dataclass(frozen=True)
class Awq(Coded):
    """A Linear layer's weight in AWQ's gemm layout.

    Attributes:
        codes: qweight, (in, out/8).
        zeros: qzeros, (groups, out/8).
        scales: (groups, out).
    """

    zeros: TensorRef
    scales: TensorRef

    @property
    def kind(self) -> str:
        """INT4: the layout has no other."""
        return "INT4"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.codes.shape[1] * _PER_WORD, self.codes.shape[0])

    @property
    def dtype(self) -> str:
        """That of the scales."""
        return self.scales.dtype

    @property
    def companions(self) -> tuple[TensorRef, ...]:
        """Zero points and scales."""
        return (self.zeros, self.scales)

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """A block of inputs at a time."""
        zeros, scales = _in_order(companions[0]), companions[1]
        out, inputs = self.shape
        size = inputs // len(scales)
        weight = torch.empty(self.shape, dtype=scales.dtype)
        for columns in row_blocks(inputs, out):
            groups = torch.arange(columns.start, columns.stop) // size
            weight[:, columns] = scaled(_in_order(codes[columns]), zeros[groups], scales[groups]).T
        return weight


def _in_order(words: Tensor) -> Tensor:
    """The codes of each row in the order of the outputs."""
    codes = unpacked(words, _BITS)
    return codes.reshape(len(codes), -1, _PER_WORD)[..., _PLACES].flatten(1)


def find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[Candidate]:
    """Modules with a `qweight`, where the config says that they are AWQ's."""
    settings = settings_of(config)
    if str(settings.get("quant_method", "")).lower() != "awq":
        return []
    return [
        Candidate(f"{module}.weight", "AWQ", full_names(module, parts, "qweight"), partial(_awq, parts, settings))
        for module, parts in modules(tensors, PARTS, "qweight|qzeros").items()
    ]


def _awq(parts: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> Awq:
    layouts = (settings.get(key) for key in ("version", "format", "checkpoint_format"))
    layout = str(next((given for given in layouts if given is not None), "gemm")).lower()
    if layout != "gemm":
        raise SourceError(f"the layout {layout!r} is not known here: pass the weights in bf16 or fp16")
    codes, zeros, scales = (needed(parts, part) for part in ("qweight", "qzeros", "scales"))
    expect(codes, ("I32", "U32"))
    expect(scales, SCALES)
    if len(codes.shape) != 2 or len(scales.shape) != 2 or not codes.numel or not scales.numel:
        raise SourceError(f"{codes.name} is {list(codes.shape)}, which is no matrix of codes")
    inputs, words = codes.shape
    groups = scales.shape[0]
    expect(scales, SCALES, (groups, words * _PER_WORD))
    expect(zeros, ("I32", "U32"), (groups, words))
    size = settings.get("group_size")
    if inputs % groups or (type(size) is int and size > 0 and size != inputs // groups):
        raise SourceError(f"{groups} groups of {size} are not {inputs} inputs")
    return Awq(codes, zeros, scales)
