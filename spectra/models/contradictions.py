"""Where the configs of two models say that they are not one architecture of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectra.models.architectures import section

# What is compared, and the keys under which architectures keep it.
_SIZES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("layers", ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")),
    ("hidden units", ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "embed_dim")),
    ("attention heads", ("num_attention_heads", "n_head", "n_heads", "num_heads")),
    ("key-value heads", ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv")),
    ("units per feed-forward layer", ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size")),
    ("tokens in the vocabulary", ("vocab_size", "padded_vocab_size")),
)


def contradictions(tuned: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """One sentence for each size, or model type, in which the two configs differ.

    What only one of them says is no contradiction: an adapter's folder has no model's config, and a
    GGUF file's metadata leave things out. Of composite models the language parts are compared with
    each other, or with a plain language model, and the vision parts with each other.

    >>> contradictions({"num_hidden_layers": 6}, {"n_layer": 4})
    ['the base has 4 layers, the tuned model has 6 (num_hidden_layers)']
    """
    said = _between(section(tuned, ""), section(base, ""), "")
    visions = [config.get("vision_config") for config in (tuned, base)]
    if all(isinstance(vision, Mapping) for vision in visions):
        said += _between(visions[0] or {}, visions[1] or {}, "in vision_config ")
    return said


def _between(tuned: Mapping[str, Any], base: Mapping[str, Any], where: str) -> list[str]:
    said = []
    kinds = (base.get("model_type"), tuned.get("model_type"))
    if all(kinds) and kinds[0] != kinds[1] and "litgpt" not in kinds:  # LitGPT's word for all architectures
        said.append(f"{where}the base is of type {kinds[0]!r}, the tuned model of type {kinds[1]!r} (model_type)")
    for what, keys in _SIZES:
        key, after = _first(tuned, keys)
        other, before = _first(base, keys)
        if before is not None and after is not None and before != after:
            said.append(f"{where}the base has {before} {what}, the tuned model has {after} ({key or other})")
    return said


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int | None]:
    """The first of the keys that holds a positive whole number, and the number."""
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return key, value
    return "", None
