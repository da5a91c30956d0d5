"""What the benchmarks work on: matrices in memory, and models and adapters as files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LLAMA_7B = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}  # fmt: skip
LAYERS = 32
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Independent normal entries, float32: no gap anywhere."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decaying(size: int, seed: int = 0) -> Tensor:
    """Singular values 1/i, float32."""
    u, v = (torch.linalg.qr(gaussian(size, size, seed + side)).Q for side in (1, 2))
    return (u / torch.arange(1, size + 1)) @ v.T


def factors(rows: int, rank: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two bf16 factors, as adapters store them."""
    return gaussian(rows, rank, seed).bfloat16(), gaussian(rank, columns, seed + 1).bfloat16()


def write_lora(folder: Path, rank: int = 64, layers: int = LAYERS) -> Path:
    """A PEFT LoRA adapter of LLaMA-7B's seven linear layers, bf16."""
    tensors = {}
    for layer in range(layers):
        for place, (name, (out, inside)) in enumerate(LLAMA_7B.items()):
            stem = f"base_model.model.model.layers.{layer}.{name}"
            left, right = factors(out, rank, inside, 10 * layer + place)
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = right, left
    targets = [name.split(".")[1] for name in LLAMA_7B]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    return _write(folder, "adapter_model.safetensors", tensors, "adapter_config.json", config)


def write_multilora(folder: Path, modules: int = 3, rank: int = 32, layers: int = LAYERS) -> Path:
    """A MultiLoRA adapter of LLaMA-7B's four attention layers, bf16."""
    tensors = {}
    for layer in range(layers):
        for place, name in enumerate(list(LLAMA_7B)[:4]):
            stem = f"base_model.model.model.layers.{layer}.{name}.multilora"
            left, right = factors(modules * 4096, rank, modules * 4096, 10 * layer + place)
            tensors[f"{stem}_A"] = right.reshape(rank, modules, 4096).transpose(0, 1).contiguous()
            tensors[f"{stem}_B"] = left.reshape(modules, 4096, rank)
            tensors[f"{stem}_scaling"] = gaussian(modules, 4096, layer).bfloat16()
    config = {"peft_type": "MULTILORA", "r": rank, "num_modules": modules, "lora_alpha": rank}
    return _write(folder, "adapter_model.safetensors", tensors, "adapter_config.json", config)


def write_pair(folder: Path, layers: int) -> tuple[Path, Path]:
    """v_proj of a LLaMA-7B-shaped base and of its full fine-tune, a bf16 shard for each layer."""
    sides = folder / "base", folder / "tuned"
    weight_map = {}
    for layer in range(layers):
        name, shard = f"model.layers.{layer}.self_attn.v_proj.weight", f"model-{layer:05}.safetensors"
        weight_map[name] = shard
        before = 0.02 * gaussian(4096, 4096, layer)
        after = before + 5e-4 * gaussian(4096, 4096, 1000 + layer)
        for side, weight in zip(sides, (before, after), strict=True):
            _write(side, shard, {name: weight.bfloat16()}, "config.json", _LLAMA | {"num_hidden_layers": layers})
    for side in sides:
        (side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sides


def write_merge(folder: Path, layers: int, rank: int = 64) -> tuple[Path, Path, Path]:
    """v_proj of a LLaMA-7B-shaped base in bf16, a LoRA of it, and the two merged in float32 and cast, as PEFT does."""
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    weights, tensors, sums = {}, {}, {}
    for layer in range(layers):
        name = f"model.layers.{layer}.self_attn.v_proj"
        left, right = factors(4096, rank, 4096, layer)
        left *= 0.001
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = right, left
        weights[f"{name}.weight"] = (0.02 * gaussian(4096, 4096, layer)).bfloat16()
        update = (left.float() @ right.float()) * 2
        sums[f"{name}.weight"] = (weights[f"{name}.weight"].float() + update).bfloat16()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["v_proj"]}
    _write(adapter, "adapter_model.safetensors", tensors, "adapter_config.json", config)
    for side, held in ((base, weights), (merged, sums)):
        _write(side, "model.safetensors", held, "config.json", _LLAMA | {"num_hidden_layers": layers})
    return base, adapter, merged


def _write(folder: Path, file: str, tensors: dict[str, Tensor], config_file: str, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    (folder / config_file).write_text(json.dumps(config))
    return folder
