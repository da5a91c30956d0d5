"""What the stored tensors of an architecture mean: orientation and fused projections, by `model_type`.

Nothing is guessed from shapes: a model type that is not listed keeps its tensors as they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from spectra.sources.tensors import TensorRef

Cut = Callable[[TensorRef], TensorRef]

# Modules that transformers stores as Conv1D, (in, out).
_CONV1D = {
    "gpt2": r"(?:attn\.c_attn|attn\.q_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$",
    "openai-gpt": r"(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$",
    "imagegpt": r"(?:attn\.c_attn|attn\.q_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$",
}


def is_conv1d(config: Mapping[str, Any], name: str) -> bool:
    """Whether the architecture stores this weight as (in, out)."""
    pattern = _CONV1D.get(str(config.get("model_type")))
    return pattern is not None and re.search(pattern, name) is not None


def oriented(config: Mapping[str, Any], name: str, ref: TensorRef) -> TensorRef:
    """The weight as (out, in), Linear orientation."""
    return ref.T if len(ref.shape) == 2 and is_conv1d(config, name) else ref


def parts(config: Mapping[str, Any], name: str, rows: int) -> dict[str, Cut]:
    """How to cut a fused projection, in Linear orientation, into its parts; {} if it is not fused.

    A cut works on anything whose first axis is the weight's: the weight itself or a left factor.
    """
    if is_conv1d(config, name) and name.endswith("attn.c_attn.weight") and rows % 3 == 0:
        return stacked(dict.fromkeys("qkv", rows // 3))
    return {}


def stacked(sizes: dict[str, int]) -> dict[str, Cut]:
    """Cuts of parts that lie one below the other."""
    cuts: dict[str, Cut] = {}
    start = 0
    for part, size in sizes.items():
        cuts[part] = partial(_rows, start, start + size)
        start += size
    return cuts


def _rows(start: int, stop: int, ref: TensorRef) -> TensorRef:
    return ref.rows(start, stop)
