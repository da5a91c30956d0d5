"""MLX: codes of 2 to 8 bits in groups along each row, with a scale and a bias per group; and MXFP4 in the same frame.

w = scale·q + bias. `weight` holds (…, out, in·bits/32) in uint32, one stream of bits per row from the low ones on;
`scales` and `biases` are (…, out, in/group). `bits`, `group_size` and `mode` stand in config.json under
`quantization`, which may name modules that differ.

The sum is formed in float32 and not rounded further. MLX's kernels disagree there: the product with a vector on
Metal keeps float32, `dequantize` on Metal rounds once to the scales' type, on the CPU after each step. What is
given here is what all of them round.

Reference: MLX 0.32, `mlx.core.quantize`; backend/metal/kernels/quantized.h (`qdot`, `dequantize`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.errors import SourceError
from spectra.files.codecs.coded import Candidate, Coded, expect, full_names, modules, needed
from spectra.files.codecs.mxfp4 import Mxfp4
from spectra.files.codecs.packing import row_blocks, unpacked
from spectra.files.dtypes import REAL_FLOATS
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "MLX"
_BITS = (2, 3, 4, 5, 6, 8)
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Mlx(Coded):
    """A weight, or a stack of experts, in MLX's affine mode.

    Attributes:
        codes: (…, out, in·bits/32).
        scales: (…, out, groups).
        biases: (…, out, groups).
        bits: of a code.
    """

    scales: TensorRef
    biases: TensorRef
    bits: int

    @property
    def kind(self) -> str:
        """Such as INT4."""
        return f"INT{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(…, out, in)."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 32 // self.bits)

    @property
    def dtype(self) -> str:
        """float32: see above."""
        return "F32"

    @property
    def companions(self) -> tuple[TensorRef, ...]:
        """Scales and biases."""
        return (self.scales, self.biases)

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """A block of rows at a time, those of all experts one below the other."""
        words, scales, biases = (tensor.flatten(0, -2) for tensor in (codes, *companions))
        size = self.shape[-1] // scales.shape[1]
        weight = torch.empty((len(words), self.shape[-1]), dtype=torch.float32)
        for rows in row_blocks(*weight.shape):
            groups = unpacked(words[rows], self.bits).to(torch.float32).reshape(-1, scales.shape[1], size)
            weight[rows] = groups.mul_(scales[rows, :, None]).add_(biases[rows, :, None]).flatten(1)
        return weight.reshape(self.shape)

    def rows(self, start: int, stop: int) -> Mlx:
        """The first axis is the weight's own in all parts."""
        codes, scales, biases = (ref.rows(start, stop) for ref in self.refs)
        return replace(self, codes=codes, scales=scales, biases=biases)

    def item(self, index: int) -> Mlx | None:
        """One expert."""
        if len(self.shape) < 3:
            return None
        codes, scales, biases = (ref.item(index) for ref in self.refs)
        return replace(self, codes=codes, scales=scales, biases=biases)


def find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[Candidate]:
    """Weights in uint32, which nobody else writes, and scales with biases that miss theirs."""
    own = config.get("quantization")
    settings = next((given for given in (own, config.get("quantization_config")) if isinstance(given, Mapping)), {})
    by_module = modules(tensors, "weight|scales|biases", "scales")
    for name, ref in tensors.items():
        module, _, part = name.rpartition(".")
        if ref.dtype == "U32" and part == "weight" and module not in by_module:
            biases = tensors.get(f"{module}.biases")
            by_module[module] = {part: ref} | ({"biases": biases} if biases is not None else {})
    return [
        Candidate(
            f"{module}.weight", TITLE, full_names(module, parts, "weight"), partial(_mlx, module, parts, settings)
        )
        for module, parts in by_module.items()
        if _is_mlx(parts, isinstance(own, Mapping))
    ]


def _is_mlx(parts: Mapping[str, TensorRef], said: bool) -> bool:
    """Whether a module's parts are codes, or what is left of them; `said` if the config says that there are some."""
    if "weight" in parts:
        return parts["weight"].dtype not in REAL_FLOATS
    return said or "biases" in parts


def _mlx(module: str, parts: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> Coded:
    codes, scales = needed(parts, "weight"), needed(parts, "scales")
    expect(codes, ("U32",))
    bits, size, mode = _settings_of(module, settings)
    if mode not in ("affine", "mxfp4"):
        raise SourceError(f"the mode {mode!r} is not known here: pass the weights in bf16 or fp16")
    if len(codes.shape) < 2 or not codes.numel:
        raise SourceError(f"{codes.name} is {list(codes.shape)}, which is no matrix of codes")
    inputs, rest = divmod(codes.shape[-1] * 32, bits)
    if rest or inputs % size or size % 8:
        raise SourceError(
            f"{codes.name} {list(codes.shape)} is no whole number of groups of {size} codes of {bits} bits, "
            "as config.json says"
        )
    groups = (*codes.shape[:-1], inputs // size)
    if mode == "mxfp4":
        return _mxfp4(codes, scales, groups, bits, size)
    biases = needed(parts, "biases")
    expect(scales, _SCALES, groups)
    expect(biases, (scales.dtype,), groups)
    return Mlx(codes, scales, biases, bits)


def _mxfp4(codes: TensorRef, scales: TensorRef, groups: tuple[int, ...], bits: int, size: int) -> Mxfp4:
    expect(scales, ("U8",), groups)
    if (bits, size) != (4, 32):
        raise SourceError(f"MXFP4 has 4 bits in groups of 32, not {bits} in {size} as config.json says")
    return Mxfp4(codes, scales)


def _settings_of(module: str, settings: Mapping[str, Any]) -> tuple[int, int, str]:
    """Bits, group size and mode of a module: its own where it is named, else everybody's."""
    own = settings.get(module)
    mine = own if isinstance(own, Mapping) else settings
    if own is False:
        raise SourceError("config.json says that this module is not quantised")
    bits, size, mode = mine.get("bits"), mine.get("group_size"), mine.get("mode", settings.get("mode", "affine"))
    if type(bits) is not int or bits not in _BITS or type(size) is not int or size < 1:
        raise SourceError(
            f"config.json gives bits = {bits!r} and group_size = {size!r} under quantization; "
            "put the model's own config beside the weights"
        )
    return bits, size, str(mode)
