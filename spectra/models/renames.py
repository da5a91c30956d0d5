"""Names that one architecture has had in different versions of transformers: a table, applied to both sides.

transformers writes a file under the names that the hub has and keeps another set in memory, which is
what PEFT saves. Both, and what came between, are brought to the names in memory today.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Rules = tuple[tuple[str, str], ...]
Compiled = tuple[tuple[re.Pattern[str], str], ...]


def _composite(*towers: str, text: str = "language_model", before: str = "") -> Rules:
    """A language model beside towers: all under `model.`, only the head outside, each a bare model.

    The hub's files have none of them under `model.`, a language model with a `model.` and a head of its
    own, and CLIP's and SigLIP's encoders inside a `vision_model.`; versions between have mixtures.
    """
    return (
        (rf"^(?:model\.)*(?:{text}\.)?lm_head\.", f"{before}lm_head."),
        (rf"^(?:model\.)*{text}\.(?:model\.)*", f"{before}model.{text}."),
        (rf"^(?:model\.)*({'|'.join(towers)})(?=\.|$)", rf"{before}model.\1"),
        (r"_tower\.vision_model\.", "_tower."),
    )


def _language_inside(*towers: str, before: str = "") -> Rules:
    """A model whose hub files keep the language model in `model.` itself, and the towers beside it."""
    known = "|".join(("language_model", *towers))
    return (
        (rf"^{before}({known})\.", rf"{before}model.\1."),
        (rf"^{before}model\.(?!(?:{known})\.)", f"{before}model.language_model."),
    )


_IMAGES = ("vision_tower", "multi_modal_projector", "image_newline")
_LLAVA = _composite(*_IMAGES)
_AUDIO = _composite("audio_tower", "multi_modal_projector")
_GRANITE_SPEECH = _composite("encoder", "projector")
_QWEN_VL = _language_inside("visual")
_QWEN_OMNI = _language_inside("visual", "audio_tower", before="thinker.")
_THINKER = ((r"^thinker\.", ""), *_language_inside("visual", "audio_tower"))
# model_type of the whole model → (a name's old beginning, its new one), regular expressions tried in order.
_WHOLE: dict[str, Rules] = {
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    **dict.fromkeys(
        ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "aria", "paligemma", "gemma3",
         "mistral3", "internvl", "aya_vision", "cohere2_vision", "got_ocr2", "pp_chart2table",
         "lfm2_vl"),
        _LLAVA,
    ),
    "shieldgemma2": _composite(*_IMAGES, before="model."),
    "video_llava": _composite("image_tower", "video_tower", "multi_modal_projector"),
    "mllama": _composite("vision_model", "multi_modal_projector"),
    "fuyu": _composite("vision_embed_tokens"),
    "emu3": _composite("vqmodel", text="text_model"),
    **dict.fromkeys(
        ("qwen2_audio", "voxtral", "voxtral_realtime", "audioflamingo3", "musicflamingo", "glmasr"), _AUDIO
    ),
    "granite_speech": _GRANITE_SPEECH,
    "granite_speech_plus": _GRANITE_SPEECH,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_5_omni": _QWEN_OMNI,
    "qwen3_omni_moe": _QWEN_OMNI,
    "qwen2_5_omni_thinker": _THINKER,
    "qwen3_omni_moe_thinker": _THINKER,
    "paddleocr_vl": ((r"^mlp_AR\.", "projector."), *_language_inside("visual", "projector")),
    "colqwen2": ((r"^vlm\.model\.", "vlm."),),
    "nemotron_h": ((r"^backbone\.", "model."),),
}  # fmt: skip

_MIXTURE = ((r"\.block_sparse_moe\.", ".mlp."),)
_GRANITE = (
    (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
)
_QKV = tuple((rf"\.attention\.(?:self|attention)\.{old}\.", rf".attention.{new}_proj.")
             for old, new in (("query", "q"), ("key", "k"), ("value", "v")))  # fmt: skip
_DENSE = (
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
)
_VIT = ((r"(?<![^.])encoder\.layer\.(?=\d)", "layers."), *_QKV, *_DENSE)
_BEIT = (
    (r"\.attention\.attention\.relative_position_bias\.", ".relative_position_bias."),
    (r"(?<![^.])encoder\.relative_position_bias\.", "shared_position_bias."),
    *_VIT,
)
_SWIN = (
    (r"\.attention\.self\.(?=relative_position_bias_table$)", ".attention.relative_position_bias."),
    *_QKV,
    *_DENSE,
)
_SEGFORMER = (
    (r"(?<![^.])encoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"(?<![^.])encoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"(?<![^.])encoder\.layer_norm\.(\d+)\.", r"stages.\1.layer_norm."),
    (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
    (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
    *_QKV,
    *_DENSE,
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    (r"\.layer_norm_1\.", ".layernorm_before."),
    (r"\.layer_norm_2\.", ".layernorm_after."),
    (r"(?<![^.])decode_head\.linear_c\.", "decode_head.linear_projections."),
)
_DETR = (
    (r"(?<![^.])backbone\.conv_encoder\.", "backbone."),
    (r"_attn\.out_proj\.", "_attn.o_proj."),
    (r"\.layers\.(\d+)\.fc([12])\.", r".layers.\1.mlp.fc\2."),
)
# The same for what may stand inside a composite model, too: patterns for anywhere in a name.
_PART: dict[str, Rules] = {
    "mixtral": _MIXTURE,
    "minimax": _MIXTURE,
    "minimax_m2": _MIXTURE,
    "phimoe": (*_MIXTURE, (r"\.mlp\.gate\.weight$", ".mlp.router.weight")),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "aria_text": (
        (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),
        (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
    ),
    **dict.fromkeys(
        ("vit", "audio-spectrogram-transformer", "deit", "ijepa", "vit_msn", "vivit"), _VIT
    ),
    # transformers 5.23 reverses "layers." too often when it writes the decoder's names.
    "vit_mae": ((r"(?<![^.])decoder_encoder\.layer\.", "decoder_layers."), *_VIT),
    "beit": _BEIT,
    "swin": _SWIN,
    "dinov2": (*_QKV, _DENSE[0]),
    "dinov2_with_registers": (*_QKV, _DENSE[0]),
    "dinov3_vit": ((r"(?<![^.])(?<!model\.)layer\.(?=\d)", "model.layer."),),
    "segformer": _SEGFORMER,
    "detr": _DETR,
    "clip_text_model": ((r"(?<![^.])text_model\.(?=encoder\.|embeddings\.|final_layer_norm\.)", ""),),
}  # fmt: skip
_EVERYWHERE = ((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias"))


def current(config: Mapping[str, Any], name: str) -> str:
    """The name that the newest transformers gives the tensor, or the name itself.

    >>> current({"model_type": "gpt_neox"}, "embed_out.weight")
    'lm_head.weight'
    >>> current({"model_type": "mllama"}, "language_model.model.layers.0.mlp.up_proj.weight")
    'model.language_model.layers.0.mlp.up_proj.weight'
    """
    return renamed(rules_of(config), name)


def rules_of(config: Mapping[str, Any]) -> Compiled:
    """The rules for all tensors of a config, in order: of thousands of names it is asked once."""
    rules = [*_EVERYWHERE, *_WHOLE.get(str(config.get("model_type")), ())]
    for kind in _types(config):
        rules += _PART.get(kind, ())
    return tuple((re.compile(pattern), new) for pattern, new in rules)


def renamed(rules: Compiled, name: str) -> str:
    """A name after all rules, one after the other."""
    for pattern, new in rules:
        name = pattern.sub(new, name)
    return name


def _types(config: Mapping[str, Any]) -> list[str]:
    """The model types of a config and of the parts that it describes, each once."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return list(dict.fromkeys(str(part["model_type"]) for part in parts if part.get("model_type")))
