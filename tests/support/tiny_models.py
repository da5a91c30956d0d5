"""Models of transformers in miniature: of any type, from its default config with every size cut down."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 1, "vocab_size": 64, "image_size": 16, "patch_size": 8, "embed_dim": 16, "d_model": 16,
    "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_layers": 2, "depth": 2,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "num_heads": 2, "num_layers": 2, "output_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 16, "moe_intermediate_size": 8,
    "moe_num_experts": 2, "num_experts_per_tok": 1, "num_global_layers": 1, "mlp_dim": 24,
    "out_hidden_size": 16, "cross_attention_layers": [1], "max_position_embeddings": 64, "temporal_patch_size": 2,
    "context_size": 8, "max_pos_emb": 16, "conv_kernel_size": 3, "decoder_hidden_size": 16,
    "decoder_intermediate_size": 24, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1,
    "attn_layer_indices": [1], "deepstack_visual_indexes": [1], "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
}  # fmt: skip
_GENERATED = ("out_features", "out_indices", "stage_names")
_LISTS_PER_LAYER = ("layer_types",)


def tiny_model(cls: str, kind: str, seed: int = 0, **options: Any) -> Any:
    """A model of a class and model type with random weights; options go into the config, nested ones as dicts."""
    whole = CONFIG_MAPPING[kind]().to_dict()
    _shrink(whole)
    _override(whole, options)
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(CONFIG_MAPPING[kind].from_dict(whole))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _shrink(config: dict[str, Any]) -> None:
    for key, value in list(config.items()):
        if key in _GENERATED:
            del config[key]
        elif isinstance(value, dict):
            _shrink(value)
        elif key in _SIZES and value is not None and isinstance(value, list) == isinstance(_SIZES[key], list):
            config[key] = _SIZES[key]
        elif key in _LISTS_PER_LAYER and value:
            config[key] = value[:2]


def _override(config: dict[str, Any], options: dict[str, Any]) -> None:
    for key, value in options.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _override(config[key], value)
        else:
            config[key] = value
