"""Names that one architecture had in different versions of transformers: a table, applied to both sides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_VISION_LANGUAGE = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|image_newline)(?=\.|$)", r"model.\1"),
)
_QWEN_VL = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_MIXTURE = ((r"\.block_sparse_moe\.", ".mlp."),)
_GRANITE = (
    (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
)
# model_type → (older name, newer name), regular expressions tried in order.
_BY_TYPE: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "mixtral": _MIXTURE,
    "minimax": _MIXTURE,
    "minimax_m2": _MIXTURE,
    "phimoe": (*_MIXTURE, (r"\.mlp\.gate\.weight$", ".mlp.router.weight")),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    **dict.fromkeys(
        ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "paligemma", "gemma3", "mistral3",
         "internvl", "aya_vision", "got_ocr2"),
        _VISION_LANGUAGE,
    ),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
}  # fmt: skip
_EVERYWHERE = ((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias"))


def current(config: Mapping[str, Any], name: str) -> str:
    """The name that the newest transformers gives the tensor, or the name itself.

    >>> current({"model_type": "gpt_neox"}, "embed_out.weight")
    'lm_head.weight'
    """
    for pattern, new in (*_EVERYWHERE, *_BY_TYPE.get(str(config.get("model_type")), ())):
        name = re.sub(pattern, new, name)
    return name
