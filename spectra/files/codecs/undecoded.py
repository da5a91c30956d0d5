"""Formats that are recognised and not decoded: their weights are refused by name, with all that belongs to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from spectra.errors import SourceError
from spectra.files.codecs.coded import Candidate, full_names, modules
from spectra.files.tensors import TensorRef

# Title, the last words that belong to the format, the one that tells it, and the type that this one has.
_FORMATS: tuple[tuple[str, str, str, str], ...] = (
    ("HQQ",
     "W_q|meta|scale|zero|shape|nbits|group_size|axis|packing|compute_dtype|channel_wise|optimize|round_zero|"
     "view_as_float|unpack_view_dtype|quant_scale|quant_zero|offload_meta|encoded_state_dict|stores_quant_config",
     "W_q", ""),
    ("Marlin", "B|s|workspace|g_idx|perm", "B", "I32"),
    ("NVFP4", "weight|weight_scale|weight_scale_2|input_scale", "weight_scale_2", ""),
    ("quanto", r"weight\._(?:data|scale|shift)|input_scale|output_scale", r"weight\._data", ""),
)  # fmt: skip


def find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[Candidate]:
    """Weights of known formats, and int8 codes with a scale of which nobody says how they belong together."""
    candidates = []
    for title, parts, marker, dtype in _FORMATS:
        for module, mine in modules(tensors, parts, marker).items():
            told = next(part for part in mine if re.fullmatch(marker, part))
            if not dtype or mine[told].dtype == dtype:
                names = full_names(module, mine, "weight" if "weight" in mine else told)
                candidates.append(
                    Candidate(f"{module}.weight", title, names, partial(_refuse, "this format is not read"))
                )
    for name, ref in tensors.items():
        if ref.dtype == "I8" and f"{name}_scale" in tensors:
            companions = [other for end in ("_scale", "_zero_point") if (other := name + end) in tensors]
            why = "config.json does not say whose they are"
            candidates.append(Candidate(name, "int8", (name, *companions), partial(_refuse, why)))
    return candidates


def _refuse(why: str) -> NoReturn:
    raise SourceError(f"{why}: pass the weights in bf16 or fp16")
