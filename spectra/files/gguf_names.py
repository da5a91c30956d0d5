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
class Architecture:
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
    "llama": Architecture("llama", permuted=True),
    "granite": Architecture("granite", permuted=True),
    "smollm3": Architecture("smollm3", permuted=True),
    "olmo": Architecture("olmo", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", block=_GEMMA_NORMS),
    "gemma3": Architecture("gemma3_text", block=_GEMMA_NORMS),
    "phi3": Architecture("phi3", block=(("ffn_up", "mlp.gate_up_proj"),)),
    "starcoder2": Architecture("starcoder2", block=(("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj"))),
    "qwen2moe": Architecture("qwen2_moe", block=_QWEN_SHARED, expert=_QWEN_EXPERT),
    "qwen3moe": Architecture("qwen3_moe", block=_QWEN_SHARED, expert=_QWEN_EXPERT),
}
_MIXTRAL = Architecture(
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
    scheme = architecture(arch, mixture=_number(header, f"{arch}.expert_count") > 0)
    if scheme is None:
        why = (
            f"{where}: GGUF architecture {arch!r} is not in the table, so tensors keep llama.cpp's names and row order"
        )
        return Named(header.tensors, header.broken, {}, (why,))
    config = _config(header, arch, scheme)
    tensors: dict[str, TensorRef] = {}
    broken = {plain_name(name, scheme) or name: why for name, why in header.broken.items()}
    for name, ref in header.tensors.items():
        straight = _unpermuted(name, ref, scheme, config)
        if straight is None:
            why = f"{where} gives no head count that fits its rows, so llama.cpp's permutation cannot be undone"
            broken[plain_name(name, scheme) or name] = why
        else:
            tensors.update(_translated(name, straight, scheme))
    return Named(tensors, broken, config, ())


def is_adapter(header: Header) -> bool:
    """Whether a file holds an adapter, as it says, or as the names of its tensors do."""
    factors = any(name.endswith((".lora_a", ".lora_b")) for name in (*header.tensors, *header.broken))
    return factors or header.metadata.get("general.type") == "adapter"


def architecture(name: str, *, mixture: bool) -> Architecture | None:
    """How llama.cpp's names of an architecture map, or None; its "llama" is a Mixtral where there are experts."""
    return _MIXTRAL if name == "llama" and mixture else _ARCHITECTURES.get(name)


def _config(header: Header, arch: str, scheme: Architecture) -> dict[str, Any]:
    heads = _number(header, f"{arch}.attention.head_count")
    groups = _number(header, f"{arch}.attention.head_count_kv") or heads
    config: dict[str, Any] = {
        "model_type": scheme.model_type,
        "tie_word_embeddings": "output.weight" not in header.tensors and "output.weight" not in header.broken,
    }
    width = _number(header, f"{arch}.attention.key_length")
    hidden = _number(header, f"{arch}.embedding_length")
    known = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": width, "hidden_size": hidden}
    return config | {key: value for key, value in known.items() if value}


def _number(header: Header, key: str) -> int:
    value = header.metadata.get(key)
    return value if type(value) is int and value > 0 else 0


def permuted_part(name: str, scheme: Architecture) -> str | None:
    """Which of q and k a weight is, where llama.cpp stores its rows in another order; None for all other weights.

    >>> permuted_part("blk.0.attn_k.weight", Architecture("llama", permuted=True))
    'k'
    """
    part = re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", name)
    return part[1] if scheme.permuted and part else None


def _unpermuted(name: str, ref: TensorRef, scheme: Architecture, config: dict[str, Any]) -> TensorRef | None:
    """Rows of q and k back in the order (half, position) within each head; None if the heads are not known."""
    part = permuted_part(name, scheme)
    if part is None:
        return ref
    heads = config.get("num_attention_heads" if part == "q" else "num_key_value_heads", 0)
    rows = ref.shape[0]
    if not heads or rows % (2 * heads):
        return None
    return ref.reshape(heads, rows // heads // 2, 2, *ref.shape[1:]).permute(0, 2, 1, 3).reshape(*ref.shape)


def _translated(name: str, ref: TensorRef, scheme: Architecture) -> dict[str, TensorRef]:
    count = ref.shape[0] if len(ref.shape) == 3 and ref.numel else 0
    names = expert_names(name, scheme, count)
    if names:
        return {new: ref.item(index) for index, new in enumerate(names)}
    new = plain_name(name, scheme)
    if new is None:
        return {name: ref}
    return {new: ref.reshape(1, ref.numel) if new.endswith("shared_expert_gate.weight") else ref}


def expert_names(name: str, scheme: Architecture, count: int) -> list[str]:
    """What transformers calls each of the experts in a stack; [] for a weight that is none."""
    stack = re.fullmatch(r"blk\.(\d+)\.(ffn_(?:gate|up|down)_exps)\.weight", name)
    if stack is None or not scheme.expert:
        return []
    return [_expert(scheme, stack[1], _EXPERTS[stack[2]], index) for index in range(count)]


def plain_name(name: str, scheme: Architecture) -> str | None:
    """What transformers calls one of llama.cpp's tensors that is not a stack; None for an unknown name.

    >>> plain_name("blk.3.ffn_up.weight", Architecture("llama"))
    'model.layers.3.mlp.up_proj.weight'
    """
    one = _ONE_EXPERT.fullmatch(name)
    if one and scheme.expert:
        return _expert(scheme, one[1], one[2], int(one[3]))
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    inner = (_BLOCK | dict(scheme.block)).get(block[2]) if block else None
    return f"model.layers.{block[1]}.{inner}.{suffix}" if block and inner else None


def _expert(scheme: Architecture, layer: str, part: str, index: int) -> str:
    part = _MIXTRAL_PARTS[part] if scheme is _MIXTRAL else part
    return f"model.layers.{layer}.{scheme.expert.format(expert=index, part=part)}.weight"
