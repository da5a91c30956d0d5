"""fp8: W = code·scale, with one scale per tensor, per row (compressed-tensors, FBGEMM) or per block of both axes.

The product is exact in float64, in which it is given: kernels multiply in float32 or scale the sums of a matrix
product, and none rounds the weight itself.

Reference: DeepSeek-AI 2024 (DeepSeek-V3), §3.3.2, for blocks of `weight_block_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from spectra.errors import SourceError
from spectra.files.codecs.coded import Candidate, Coded, settings_of
from spectra.files.codecs.packing import row_blocks
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "fp8"
DTYPES = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")  # appended to the weight's own name
_COMFY_SCALE = "scale_weight"  # beside the weight


@dataclass(frozen=True)
class Fp8(Coded):
    """A weight in 8-bit floats with its scales.

    Attributes:
        codes: (out, in), or any shape with one scale.
        scales: a single entry, one per row, or one per block.
        block: the (rows, columns) that one entry stands for; () without blocks.
    """

    linear: ClassVar[bool] = False
    scales: TensorRef
    block: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """The storage type."""
        return self.codes.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As the codes are stored."""
        return self.codes.shape

    @property
    def dtype(self) -> str:
        """float64: see above."""
        return "F64"

    @property
    def companions(self) -> tuple[TensorRef, ...]:
        """The scales."""
        return (self.scales,)

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """A block of rows at a time."""
        scales = companions[0].to(torch.float64)
        if scales.numel() == 1:
            return codes.to(torch.float64).mul_(scales.reshape(()))
        height, width = self.block or (1, 1)
        by_row = scales.reshape(-(-self.shape[0] // height), -1).repeat_interleave(width, 1)
        weight = torch.empty(self.shape, dtype=torch.float64)
        for rows in row_blocks(*self.shape):
            of_rows = torch.arange(rows.start, rows.stop) // height
            torch.mul(codes[rows].to(torch.float64), by_row[of_rows, : self.shape[1]], out=weight[rows])
        return weight


def find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[Candidate]:
    """Every tensor in fp8, and scales that miss theirs."""
    candidates = []
    for name, ref in tensors.items():
        if ref.dtype in DTYPES:
            scale = _scale_of(name, tensors)
            names = (name, scale) if scale else (name,)
            candidates.append(Candidate(name, TITLE, names, partial(_fp8, ref, tensors.get(scale or ""), config)))
        stem = name.removesuffix(_SCALES[0])
        if stem != name and stem not in tensors:
            candidates.append(Candidate(stem, TITLE, (name,), _missing))
    return candidates


def _scale_of(name: str, tensors: Mapping[str, TensorRef]) -> str | None:
    module, _, last = name.rpartition(".")
    candidates = [name + suffix for suffix in _SCALES]
    if last == "weight":
        candidates.append(f"{module}.{_COMFY_SCALE}")
    return next((candidate for candidate in candidates if candidate in tensors), None)


def _fp8(codes: TensorRef, scales: TensorRef | None, config: Mapping[str, Any]) -> Fp8:
    if scales is None:
        raise SourceError("fp8 without its scale, so the values are not known: download or save it again")
    if not scales.is_float:
        raise SourceError(f"the scale {scales.name} is stored as {scales.dtype}, not as real numbers")
    if scales.numel == 1:
        return Fp8(codes, scales)
    if len(codes.shape) != 2:
        raise SourceError(f"{len(codes.shape)} axes with a scale of {list(scales.shape)} are not known here")
    rows, columns = codes.shape
    if scales.shape in ((rows, 1), (rows,)):
        return Fp8(codes, scales)
    block = _block_size(config)
    if block is None:
        raise SourceError(
            f"the scale {scales.name} {list(scales.shape)} is per block and config.json gives no "
            "weight_block_size: put the config beside the weights"
        )
    block = (min(block[0], rows), min(block[1], columns))
    if not codes.numel or scales.shape != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        raise SourceError(f"the scale {list(scales.shape)} does not fit {list(codes.shape)} in blocks of {list(block)}")
    return Fp8(codes, scales, block)


def _missing() -> Fp8:
    raise SourceError("there is a scale, and the weight is not in the file; download or save it again")


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, from where DeepSeek's and compressed-tensors' configs have them."""
    settings = settings_of(config)
    found = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    if found is None and isinstance(groups, Mapping):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        sizes = [item["block_structure"] for item in weights if isinstance(item, Mapping) and "block_structure" in item]
        found = sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
    if isinstance(found, list) and len(found) == 2 and all(type(size) is int and size > 0 for size in found):
        return (found[0], found[1])
    return None
