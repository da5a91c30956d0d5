"""Checkpoint folders in the layouts that people have, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
LLAMA_MLP = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
VOCABULARY = 32


def llama_tensors(layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of a LLaMA-shaped model, random."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, 16)}
    for layer in range(layers):
        for block, parts in (("self_attn", LLAMA), ("mlp", LLAMA_MLP)):
            shapes |= {f"model.layers.{layer}.{block}.{part}.weight": shape for part, shape in parts.items()}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (16,)
    shapes |= {"model.norm.weight": (16,), "lm_head.weight": (VOCABULARY, 16)}
    return {name: torch.randn(shape, generator=generator).mul(0.05).to(dtype) for name, shape in shapes.items()}


def nudged(tensors: dict[str, torch.Tensor], seed: int = 1, size: float = 0.01) -> dict[str, torch.Tensor]:
    """The same model after some training: every tensor moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (t + size * torch.randn(t.shape, generator=generator)).to(t.dtype) for name, t in tensors.items()}


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, config: dict | None = None
) -> Path:
    """A folder with `model.safetensors`, or shards and their index, and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict | None, header: dict[str, str] | None = None
) -> Path:
    """A PEFT-like adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", header)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
