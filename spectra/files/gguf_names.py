"""What GGUF tensors are in the words of transformers' checkpoints: names, orientation of heads, config.

llama.cpp stores q and k of some architectures with the halves of each head interleaved for its
rotary embedding; that is undone here. Architectures that are not listed keep the file's own names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from spectra.files.header import Header
from spectra.files.tensors import TensorRef

_TOP = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
}
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}
_ONE_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")


@dataclass(frozen=True)
class _Architecture:
    """How one GGUF architecture maps: its model_type, whether q and k are permuted, names that differ."""

    model_type: str
    permuted: bool = False
    block: tuple[tuple[str, str], ...] = ()
    expert: str = ""
    router: str = ""


_QWEN_SHARED = (
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
)
_GEMMA_NORMS = (
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
_QWEN_EXPERT = "mlp.experts.{expert}.{part}_proj"
_ARCHITECTURES = {
    "llama": _Architecture("llama", permuted=True),
    "granite": _Architecture("granite", permuted=True),
    "smollm3": _Architecture("smollm3", permuted=True),
    "olmo": _Architecture("olmo", permuted=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2", block=_GEMMA_NORMS),
    "gemma3": _Architecture("gemma3_text", block=_GEMMA_NORMS),
    "phi3": _Architecture("phi3", block=(("ffn_up", "mlp.gate_up_proj"),)),
    "starcoder2": _Architecture("starcoder2", block=(("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj"))),
    "qwen2moe": _Architecture("qwen2_moe", block=_QWEN_SHARED, expert=_QWEN_EXPERT),
    "qwen3moe": _Architecture("qwen3_moe", block=_QWEN_SHARED, expert=_QWEN_EXPERT),
}
_MIXTRAL = _Architecture(
    "mixtral",
    permuted=True,
    block=(("ffn_gate_inp", "block_sparse_moe.gate"),),
    expert="block_sparse_moe.experts.{expert}.{part}",
)
_MIXTRAL_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Named:
    """The tensors of a GGUF file under transformers' names, and the config that its metadata amount to."""

    tensors: dict[str, TensorRef]
    broken: dict[str, str]
    config: dict[str, Any]
    warnings: tuple[str, ...]


def named(header: Header, where: str) -> Named:
    """Translate one header (or the merged header of a split file)."""
    arch = str(header.metadata.get("general.architecture"))
    found = _ARCHITECTURES.get(arch)
    if arch == "llama" and _number(header, f"{arch}.expert_count"):
        found = _MIXTRAL
    if found is None:
        why = (
            f"{where}: GGUF architecture {arch!r} is not in the table, so tensors keep llama.cpp's names and row order"
        )
        return Named(header.tensors, header.broken, {}, (why,))
    config = _config(header, arch, found)
    tensors: dict[str, TensorRef] = {}
    broken = {_plain_name(name, found) or name: why for name, why in header.broken.items()}
    for name, ref in header.tensors.items():
        straight = _unpermuted(name, ref, found, config)
        if straight is None:
            why = f"{where} gives no head count that fits its rows, so llama.cpp's permutation cannot be undone"
            broken[_plain_name(name, found) or name] = why
        else:
            tensors.update(_translated(name, straight, found))
    return Named(tensors, broken, config, ())


def _config(header: Header, arch: str, found: _Architecture) -> dict[str, Any]:
    heads = _number(header, f"{arch}.attention.head_count")
    groups = _number(header, f"{arch}.attention.head_count_kv") or heads
    config: dict[str, Any] = {
        "model_type": found.model_type,
        "tie_word_embeddings": "output.weight" not in header.tensors and "output.weight" not in header.broken,
    }
    width = _number(header, f"{arch}.attention.key_length")
    hidden = _number(header, f"{arch}.embedding_length")
    known = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": width, "hidden_size": hidden}
    return config | {key: value for key, value in known.items() if value}


def _number(header: Header, key: str) -> int:
    value = header.metadata.get(key)
    return value if type(value) is int and value > 0 else 0


def _unpermuted(name: str, ref: TensorRef, found: _Architecture, config: dict[str, Any]) -> TensorRef | None:
    """Rows of q and k back in the order (half, position) within each head; None if the heads are not known."""
    part = re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", name)
    if not found.permuted or part is None:
        return ref
    heads = config.get("num_attention_heads" if part[1] == "q" else "num_key_value_heads", 0)
    rows = ref.shape[0]
    if not heads or rows % (2 * heads):
        return None
    return ref.reshape(heads, rows // heads // 2, 2, *ref.shape[1:]).permute(0, 2, 1, 3).reshape(*ref.shape)


def _translated(name: str, ref: TensorRef, found: _Architecture) -> dict[str, TensorRef]:
    stack = re.fullmatch(r"blk\.(\d+)\.(ffn_(?:gate|up|down)_exps)\.weight", name)
    if stack and found.expert and len(ref.shape) == 3 and ref.numel:
        part = _EXPERTS[stack[2]]
        return {_expert(found, stack[1], part, index): ref.item(index) for index in range(ref.shape[0])}
    new = _plain_name(name, found)
    if new is None:
        return {name: ref}
    return {new: ref.reshape(1, ref.numel) if new.endswith("shared_expert_gate.weight") else ref}


def _plain_name(name: str, found: _Architecture) -> str | None:
    one = _ONE_EXPERT.fullmatch(name)
    if one and found.expert:
        return _expert(found, one[1], one[2], int(one[3]))
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    inner = (_BLOCK | dict(found.block)).get(block[2]) if block else None
    return f"model.layers.{block[1]}.{inner}.{suffix}" if block and inner else None


def _expert(found: _Architecture, layer: str, part: str, index: int) -> str:
    part = _MIXTRAL_PARTS[part] if found is _MIXTRAL else part
    return f"model.layers.{layer}.{found.expert.format(expert=index, part=part)}.weight"
