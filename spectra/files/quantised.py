"""Weights that are stored as codes: fp8 with its scales is decoded, packed formats are refused by name.

fp8: W = code ∘ scale, with one scale per tensor, per row (compressed-tensors, FBGEMM) or per block of
`weight_block_size` (DeepSeek-AI 2024, DeepSeek-V3, §3.3.2). The product is exact in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spectra.files.tensors import TensorRef

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")  # appended to the weight's own name
_COMFY_SCALE = "scale_weight"  # beside the weight
# What stands for `<module>.weight`, which format it belongs to, and which tensors go with it.
_PACKED: tuple[tuple[str, str, str], ...] = (
    ("qweight", "GPTQ or AWQ", r"qweight|qzeros|scales|g_idx|perm|workspace"),
    ("weight_packed", "compressed-tensors (packed)",
     r"weight_packed|weight_(?:shape|scale|zero_point|g_idx|global_scale)|input_(?:scale|zero_point|global_scale)"),
    ("W_q", "HQQ", r"W_q|meta|scale|zero"),
)  # fmt: skip
_BITSANDBYTES_4 = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$")
_BITSANDBYTES_8 = re.compile(r"\.(SCB|weight_format)$")


@dataclass(frozen=True)
class Decoded:
    """A folder's tensors after decoding.

    Attributes:
        tensors: name → reference that reads as real numbers, and whatever is not a weight's code.
        packed: weight → why it cannot be decoded.
        warnings: what was decoded.
    """

    tensors: dict[str, TensorRef]
    packed: dict[str, str]
    warnings: tuple[str, ...] = ()


def decode(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Decoded:
    """Attach scales to fp8 weights, and take packed weights with their companions out of the list."""
    left = dict(tensors)
    packed = _take_packed(left, config) | _take_bitsandbytes(left) | _take_mxfp4(left)
    decoded = 0
    for name, ref in list(left.items()):
        if name not in left or ref.dtype not in (*_FP8, "I8"):
            continue
        companion = _scale_of(name, left)
        if companion is None:
            if ref.dtype in _FP8:
                packed[name] = f"fp8 without its scale in {ref.path}: the values are not known"
                del left[name]
            continue
        found = _with_scale(ref, left[companion], companion.endswith("_inv"), config)
        del left[companion]
        if isinstance(found, str):
            packed[name] = found
            del left[name]
        else:
            left[name] = found
            decoded += 1
    where = next((ref.path for ref in tensors.values()), "")
    said = f"{where}: {decoded} weights are fp8 codes times scales, so ΔW includes what fp8 rounded away"
    return Decoded(left, packed, (said,) if decoded else ())


def _scale_of(name: str, tensors: Mapping[str, TensorRef]) -> str | None:
    module, _, last = name.rpartition(".")
    candidates = [name + suffix for suffix in _SCALES]
    if last == "weight":
        candidates.append(f"{module}.{_COMFY_SCALE}")
    return next((candidate for candidate in candidates if candidate in tensors), None)


def _with_scale(ref: TensorRef, scale: TensorRef, inverse: bool, config: Mapping[str, Any]) -> TensorRef | str:
    """The weight as codes times its scale, or why their layout is not certain."""
    if ref.dtype not in _FP8:
        return f"int8 codes with a scale in {ref.path}: this quantised format is not decoded"
    if not scale.is_float:
        return f"the fp8 scale {scale.name} in {scale.path} is stored as {scale.dtype}, which is not decoded"
    if scale.numel == 1:
        return replace(ref, scale=scale)
    if len(ref.shape) != 2:
        return f"fp8 with {len(ref.shape)} axes and a scale {list(scale.shape)} in {ref.path} is not decoded"
    rows, columns = ref.shape
    if scale.shape in ((rows, 1), (rows,)):
        return replace(ref, scale=scale)
    block = _block_size(config)
    if block is None:
        return (
            f"the fp8 scale {scale.name} {list(scale.shape)} is per block and config.json gives no "
            "weight_block_size: put the config beside the weights"
        )
    block = (min(block[0], rows), min(block[1], columns))
    if scale.shape != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        return f"the fp8 scale {list(scale.shape)} does not fit {list(ref.shape)} in blocks of {list(block)}"
    return replace(ref, scale=scale, block=block)


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    found = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    if found is None and isinstance(groups, Mapping):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        sizes = [item["block_structure"] for item in weights if isinstance(item, Mapping) and "block_structure" in item]
        found = sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
    if isinstance(found, list) and len(found) == 2 and all(type(size) is int and size > 0 for size in found):
        return (found[0], found[1])
    return None


def _take_packed(left: dict[str, TensorRef], config: Mapping[str, Any]) -> dict[str, str]:
    settings = config.get("quantization_config")
    method = str(settings.get("quant_method", "")) if isinstance(settings, Mapping) else ""
    packed = {}
    for marker, title, companions in _PACKED:
        modules = {name.removesuffix(f".{marker}") for name in left if name.endswith(f".{marker}")}
        pattern = re.compile(rf"(.+)\.(?:{companions})")
        for name in list(left):
            found = pattern.fullmatch(name)
            if found and found[1] in modules:
                packed[f"{found[1]}.weight"] = (
                    f"{method.upper() if method and marker == 'qweight' else title} codes in {left[name].path} "
                    "are not decoded: pass the weights in bf16 or fp16"
                )
                del left[name]
    return packed


def _take_bitsandbytes(left: dict[str, TensorRef]) -> dict[str, str]:
    packed = {}
    for pattern, bits in ((_BITSANDBYTES_4, 4), (_BITSANDBYTES_8, 8)):
        for name in [name for name in left if pattern.search(name)]:
            weight = pattern.sub(".weight", name)
            if weight in left and left[weight].dtype in ("U8", "I8"):
                packed[weight] = (
                    f"bitsandbytes {bits}-bit codes in {left[weight].path} are not decoded: "
                    "pass the weights in bf16 or fp16"
                )
                del left[name]
    for weight in packed:
        del left[weight]
    return packed


def _take_mxfp4(left: dict[str, TensorRef]) -> dict[str, str]:
    stems = [name.removesuffix("_blocks") for name in left if name.endswith("_blocks")]
    packed = {}
    for stem in stems:
        if f"{stem}_scales" in left and left[f"{stem}_blocks"].dtype == "U8":
            packed[stem] = f"MXFP4 codes in {left[f'{stem}_blocks'].path} are not decoded: pass the weights in bf16"
            del left[f"{stem}_blocks"], left[f"{stem}_scales"]
    return packed
