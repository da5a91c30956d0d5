"""What the stored tensors of an architecture mean: orientation and fused projections, by `model_type`.

Nothing is guessed from shapes: a model type that is not listed keeps its tensors as they are stored,
and so does one whose config and shapes contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from spectra.files.tensors import TensorRef

Cut = Callable[[TensorRef], TensorRef]
Config = Mapping[str, Any]

# Modules that transformers stores as Conv1D, (in, out).
_GPT2_CONV1D = r"(?:attn|crossattention)\.(?:c_attn|q_attn|c_proj)\.weight$|mlp\.(?:c_fc|c_proj)\.weight$"
_CONV1D = {
    "gpt2": _GPT2_CONV1D,
    "openai-gpt": _GPT2_CONV1D,
    "imagegpt": _GPT2_CONV1D,
    "decision_transformer": _GPT2_CONV1D,
}
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
_MAX_NESTING = 3  # thinker_config → text_config is the deepest there is
_VISION = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder)\.")


def section(config: Config, name: str) -> Config:
    """The part of a composite config (vision and language) that the weight belongs to.

    >>> section({"model_type": "llava", "text_config": {"model_type": "phi3"}}, "model.layers.0.mlp.x.weight")
    {'model_type': 'phi3'}
    """
    if "vis" in name and _VISION.search(name):  # the first look is the quick one
        inner = config.get("vision_config")
        return {"model_type": str(config.get("model_type")) + "/vision", **inner} if isinstance(inner, Mapping) else {}
    for _ in range(_MAX_NESTING):
        nested: list[Config] = [
            config[key] for key in _TEXT_SECTIONS if key in config and isinstance(config[key], Mapping)
        ]
        if not nested or not nested[0].get("model_type"):
            return config
        config = nested[0]
    return config


def model_type(config: Config, name: str) -> str:
    """The architecture that a weight belongs to, "" if the config does not say."""
    return str(section(config, name).get("model_type") or "")


def is_conv1d(config: Config, name: str) -> bool:
    """Whether the architecture stores this weight as (in, out)."""
    pattern = _CONV1D.get(model_type(config, name))
    return pattern is not None and re.search(pattern, name) is not None


def oriented(config: Config, name: str, ref: TensorRef) -> TensorRef:
    """The weight as (out, in), Linear orientation, in which formats that pack Linear layers have it already."""
    if ref.codec is not None and ref.codec.linear:
        return ref
    return ref.T if len(ref.shape) == 2 and is_conv1d(config, name) else ref


def parts(config: Config, name: str, rows: int) -> dict[str, Cut]:
    """How to cut a fused projection, in Linear orientation, into its parts; {} if it is not fused.

    A cut works on anything whose first axis is the weight's: the weight itself or a left factor.
    """
    own = section(config, name)
    for pattern, layout in _FUSED.get(str(own.get("model_type")), ()):
        if re.search(pattern, name):
            return layout(own, rows)
    return {}


def stacked(sizes: dict[str, int]) -> dict[str, Cut]:
    """Cuts of parts that lie one below the other."""
    cuts: dict[str, Cut] = {}
    start = 0
    for part, size in sizes.items():
        cuts[part] = partial(_rows, start, start + size)
        start += size
    return cuts


def repeated(rows: int, groups: int | None, counts: Mapping[str, int]) -> dict[str, Cut]:
    """Cuts of parts that alternate: `groups` times, each part's count of units in the order of `counts`.

    A unit is rows / (groups · Σ counts) rows, a head for attention; {} if that is not a whole number.
    """
    units = sum(counts.values())
    if not groups or groups < 0 or min(counts.values()) <= 0 or rows <= 0 or rows % (groups * units):
        return {}
    width = rows // (groups * units)
    if groups == 1:
        return stacked({part: count * width for part, count in counts.items()})
    cuts: dict[str, Cut] = {}
    start = 0
    for part, count in counts.items():
        cuts[part] = partial(_units, groups, units, width, start, start + count)
        start += count
    return cuts


def _rows(start: int, stop: int, ref: TensorRef) -> TensorRef:
    return ref.rows(start, stop)


def _units(groups: int, units: int, width: int, start: int, stop: int, ref: TensorRef) -> TensorRef:
    rest = ref.shape[1:]
    others = range(3, 3 + len(rest))
    chosen = ref.reshape(groups, units, width, *rest).permute(1, 0, 2, *others).rows(start, stop)
    return chosen.permute(1, 0, 2, *others).reshape(groups * (stop - start) * width, *rest)


def _count(config: Config, *keys: str) -> int | None:
    """The first of the keys that holds a positive whole number."""
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return None


def _heads(config: Config) -> int | None:
    return _count(config, "num_attention_heads", "n_head", "n_heads")


def _qkv_stacked(config: Config, rows: int) -> dict[str, Cut]:
    """q, k and v of equal size below one another."""
    return repeated(rows, 1, {"q": 1, "k": 1, "v": 1})


def _kv_stacked(config: Config, rows: int) -> dict[str, Cut]:
    return repeated(rows, 1, {"k": 1, "v": 1})


def _gate_up(config: Config, rows: int) -> dict[str, Cut]:
    """The activated half first."""
    return repeated(rows, 1, {"gate": 1, "up": 1})


def _by_width(config: Config, rows: int, groups: int | None, counts: Mapping[str, int]) -> dict[str, Cut]:
    """As `repeated`, only where a unit is as wide as the config says that a head is."""
    heads, hidden = _heads(config), _count(config, "hidden_size", "n_embd", "n_embed", "d_model")
    width = _count(config, "head_dim", "kv_channels")
    if width is None and heads and hidden:
        width = hidden // heads
    return repeated(rows, groups, counts) if width and rows == (groups or 0) * sum(counts.values()) * width else {}


def _qkv_by_head(config: Config, rows: int) -> dict[str, Cut]:
    """q, k and v of one head, then of the next."""
    return _by_width(config, rows, _heads(config), {"q": 1, "k": 1, "v": 1})


def _heads_stacked(config: Config, rows: int, groups: int | None) -> dict[str, Cut]:
    """All query heads, then `groups` key heads, then as many value heads."""
    heads = _heads(config)
    return _by_width(config, rows, 1, {"q": heads, "k": groups, "v": groups}) if heads and groups else {}


def _qkv_gqa(config: Config, rows: int) -> dict[str, Cut]:
    nested = config.get("attn_config")
    groups = _count(config, "num_key_value_heads")
    if groups is None and isinstance(nested, Mapping):
        groups = _count(nested, "kv_n_heads")
    return _heads_stacked(config, rows, groups or _heads(config))


def _qkv_by_group(config: Config, rows: int) -> dict[str, Cut]:
    """For each key-value head: its query heads, its key, its value."""
    heads, groups = _heads(config), _count(config, "num_kv_heads", "num_key_value_heads", "n_head_kv")
    groups = groups or heads
    if not heads or not groups or heads % groups:
        return {}
    return _by_width(config, rows, groups, {"q": heads // groups, "k": 1, "v": 1})


def _falcon(config: Config, rows: int) -> dict[str, Cut]:
    """Three generations: grouped (40B, 180B), multi-query (7B), and per head (1B)."""
    if config.get("new_decoder_architecture") or config.get("model_type") == "RefinedWeb":
        return _qkv_by_group(config, rows)
    return _bigcode(config, rows)


def _bigcode(config: Config, rows: int) -> dict[str, Cut]:
    """Multi-query below one another, or per head."""
    return _heads_stacked(config, rows, 1) if config.get("multi_query", True) else _qkv_by_head(config, rows)


def _chatglm(config: Config, rows: int) -> dict[str, Cut]:
    """Grouped heads below one another, or per head."""
    if config.get("multi_query_attention"):
        return _heads_stacked(config, rows, _count(config, "multi_query_group_num"))
    return _qkv_by_head(config, rows)


def _chatglm_mlp(config: Config, rows: int) -> dict[str, Cut]:
    """Gated from the second generation on, which is the one whose config has ffn_hidden_size."""
    width = _count(config, "ffn_hidden_size")
    return _gate_up(config, rows) if width and rows == 2 * width else {}


def _codegen(config: Config, rows: int) -> dict[str, Cut]:
    """Four blocks, each of queries, values and keys in this order."""
    cuts = repeated(rows, 4, {"q": 1, "v": 1, "k": 1})
    return {part: cuts[part] for part in "qkv"} if cuts else {}


_Layout = Callable[[Config, int], dict[str, Cut]]
_GPT2 = ((r"(?:^|\.)attn\.c_attn\.weight$", _qkv_stacked), (r"crossattention\.c_attn\.weight$", _kv_stacked))
_QKV = r"query_key_value\.weight$"
_GATE_UP = (r"mlp\.gate_up_proj\.weight$", _gate_up)
_VISUAL = ((r"attn\.qkv\.weight$", _qkv_stacked),)
_FUSED: dict[str, tuple[tuple[str, _Layout], ...]] = {
    "gpt2": _GPT2,
    "openai-gpt": _GPT2,
    "imagegpt": _GPT2,
    "decision_transformer": _GPT2,
    "gpt_neox": ((_QKV, _qkv_by_head),),
    "gpt_neox_japanese": ((_QKV, _qkv_by_head),),
    "bloom": ((_QKV, _qkv_by_head),),
    "persimmon": ((_QKV, _qkv_by_head),),
    "falcon": ((_QKV, _falcon),),
    "RefinedWeb": ((_QKV, _falcon),),
    "RefinedWebModel": ((_QKV, _falcon),),
    "gpt_bigcode": ((r"(?:^|\.)attn\.c_attn\.weight$", _bigcode),),
    "codegen": ((r"attn\.qkv_proj\.weight$", _codegen),),
    "chatglm": ((_QKV, _chatglm), (r"mlp\.dense_h_to_4h\.weight$", _chatglm_mlp)),
    "litgpt": ((r"(?:^|\.)attn\.qkv\.weight$", _qkv_gqa),),
    "phi3": ((r"self_attn\.qkv_proj\.weight$", _qkv_gqa), _GATE_UP),
    "phi3_v": ((r"self_attn\.qkv_proj\.weight$", _qkv_gqa), _GATE_UP),
    "glm": (_GATE_UP,),
    "glm4": (_GATE_UP,),
    "qwen": ((r"attn\.c_attn\.weight$", _qkv_stacked),),
    "baichuan": ((r"self_attn\.W_pack\.weight$", _qkv_stacked),),
    "internlm2": ((r"attention\.wqkv\.weight$", _qkv_by_group),),
    "mpt": ((r"attn\.Wqkv\.weight$", _qkv_gqa),),
    "dbrx": ((r"attn\.Wqkv\.weight$", _qkv_gqa),),
    "modernbert": ((r"attn\.Wqkv\.weight$", _qkv_stacked), (r"mlp\.Wi\.weight$", _gate_up)),
    "qwen2_vl": _VISUAL,
    "qwen2_vl/vision": _VISUAL,
    "qwen2_vl_vision": _VISUAL,
    "qwen2_5_vl": _VISUAL,
    "qwen2_5_vl/vision": _VISUAL,
    "qwen2_5_vl_vision": _VISUAL,
}
