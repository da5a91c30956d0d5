"""LitGPT's folders: its names and YAML, and what `LoRAQKVLinear` merges, written out (litgpt/lora.py, get_lora_AB)."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from support.peft_oracle import Oracle

PARAMS = {
    "name": "tiny", "n_layer": 2, "n_embd": 16, "n_head": 4, "n_query_groups": 2, "head_size": 4,
    "intermediate_size": 24, "padded_vocab_size": 32,
}  # fmt: skip
ROWS = {"q": 16, "k": 8, "v": 8}
STARTS = {"q": 0, "k": 16, "v": 24}
HYPERPARAMETERS = {
    "checkpoint_dir": "checkpoints/tiny", "precision": "bf16-true", "lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.05,
    "lora_query": True, "lora_key": False, "lora_value": True, "lora_projection": False, "lora_mlp": True,
    "lora_head": False,
}  # fmt: skip


def weights(layers: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LLaMA in LitGPT's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (32, 16)}
    for layer in range(layers):
        shapes |= {
            f"transformer.h.{layer}.norm_1.weight": (16,),
            f"transformer.h.{layer}.attn.qkv.weight": (32, 16),
            f"transformer.h.{layer}.attn.proj.weight": (16, 16),
            f"transformer.h.{layer}.norm_2.weight": (16,),
            f"transformer.h.{layer}.mlp.fc_1.weight": (24, 16),
            f"transformer.h.{layer}.mlp.fc_2.weight": (24, 16),
            f"transformer.h.{layer}.mlp.proj.weight": (16, 24),
        }
    shapes |= {"transformer.ln_f.weight": (16,), "lm_head.weight": (32, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], params: dict | None = PARAMS) -> Path:
    """`lit_model.pth` and its config."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "lit_model.pth")
    if params is not None:
        (folder / "model_config.yaml").write_text(yaml.safe_dump(params))
    return folder


def write_lora(
    folder: Path, tensors: dict[str, torch.Tensor], said: dict | None = HYPERPARAMETERS, params: dict | None = PARAMS
) -> Path:
    """`lit_model.pth.lora`, its hyperparameters and the model's config."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    for name, content in (("hyperparameters.yaml", said), ("model_config.yaml", params)):
        if content is not None:
            (folder / name).write_text(yaml.safe_dump(content))
    return folder


def joint_factors(module: str, trained: str = "qv", r: int = 2) -> dict[str, torch.Tensor]:
    """What `LoRAQKVLinear` holds for the trained ones of q, k and v."""
    rows = sum(ROWS[part] for part in trained)
    return {f"{module}.lora_A": torch.randn(r * len(trained), 16), f"{module}.lora_B": torch.randn(rows, r)}


def joint_updates(tensors: dict[str, torch.Tensor], trained: str = "qv", s: float = 3.0) -> dict[str, torch.Tensor]:
    """Part → ΔW: a grouped convolution of A's rows with B's, one group for each trained part."""
    A, B = (tensor.double() for tensor in tensors.values())
    downs, ups = A.chunk(len(trained)), B.split([ROWS[part] for part in trained])
    return {part: s * up @ down for part, down, up in zip(trained, downs, ups, strict=True)}


def make_litgpt_oracle(folder: Path) -> Oracle:
    """q and v of one layer, and the last matrix of the other's MLP, on a base in LitGPT's names."""
    torch.manual_seed(0)
    joint, other = "transformer.h.0.attn.qkv", "transformer.h.1.mlp.proj"
    tensors = joint_factors(joint)
    deltas = {f"{joint}.weight[{part}]": update for part, update in joint_updates(tensors).items()}
    tensors |= {f"{other}.lora_A": torch.randn(2, 24), f"{other}.lora_B": torch.randn(16, 2)}
    deltas[f"{other}.weight"] = 3 * tensors[f"{other}.lora_B"].double() @ tensors[f"{other}.lora_A"].double()
    return Oracle(write_model(folder / "base", weights()), write_lora(folder / "adapter", tensors), deltas)
