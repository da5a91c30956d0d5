"""LoRA as llama.cpp's convert_lora_to_gguf.py writes it, made from PEFT's tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import peft
import torch
from safetensors.torch import load_file

from support.peft_oracle import Oracle, make_oracle
from support.stored import write_gguf

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(b: torch.Tensor, heads: int) -> torch.Tensor:
    """Row (half, position) of each head at 2·position + half, one by one."""
    out, width = torch.empty_like(b), len(b) // heads
    for row in range(len(b)):
        head, inside = divmod(row, width)
        half, position = divmod(inside, width // 2)
        out[head * width + 2 * position + half] = b[row]
    return out


def llamacpp_tensors(stored: dict[str, torch.Tensor], *, permuted: bool) -> dict[str, torch.Tensor]:
    """PEFT's tensors under llama.cpp's names."""
    found = {}
    for name, tensor in stored.items():
        bare = name.removeprefix("base_model.model.model.")
        letter = "a" if bare.endswith(("lora_embedding_A", "lora_A.weight")) else "b"
        if bare.startswith("embed_tokens.lora_embedding"):
            found[f"token_embd.weight.lora_{letter}"] = tensor.T if letter == "a" else tensor
        elif bare.endswith((".lora_A.weight", ".lora_B.weight")):
            _, layer, inner = bare.partition(".lora_")[0].split(".", 2)
            if permuted and letter == "b" and inner.endswith(("q_proj", "k_proj")):
                tensor = interleaved(tensor, 4 if inner.endswith("q_proj") else 2)
            found[f"blk.{layer}.{NAMES[inner]}.weight.lora_{letter}"] = tensor
    return found


def said(arch: str, alpha: float | None, **more: int) -> dict[str, tuple[object, gguf.GGUFValueType]]:
    """The key-values that llama.cpp's converter writes, and more whole numbers."""
    text, real, whole = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.UINT32
    values = {"general.architecture": (arch, text), "general.type": ("adapter", text), "adapter.type": ("lora", text)}
    if alpha is not None:
        values["adapter.lora.alpha"] = (alpha, real)
    return values | {f"{arch}.{key.replace('__', '.')}": (number, whole) for key, number in more.items()}


def write_lora(
    file: Path, tensors: dict[str, torch.Tensor], arch: str = "llama", alpha: float | None = 7.0, **more: int
) -> Path:
    """A LoRA in GGUF; `attention__head_count=4` for a key of the architecture's own."""
    return write_gguf(file, tensors, said(arch, alpha, **more))


def make_gguf_oracle(folder: Path) -> Oracle:
    """A tiny LLaMA with LoRA on q, k, down and the embedding, merged by PEFT, its adapter converted."""
    targets = ["q_proj", "k_proj", "down_proj", "embed_tokens"]
    oracle = make_oracle(folder / "peft", "llama", peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    (oracle.base / "config.json").write_text(json.dumps({"model_type": "llama"} | HEADS))
    stored = load_file(oracle.adapter / "adapter_model.safetensors")
    adapter = folder / "adapter"
    write_lora(adapter / "Tiny-F64-LoRA.gguf", llamacpp_tensors(stored, permuted=True))
    return replace(oracle, adapter=adapter)
