"""One small, valid example of every format, with what its update must be: for conformance tests and fuzzing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file

from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint
from support.peft_oracle import Oracle, make_oracle


def _peft(model: str, config: Callable[[], peft.PeftConfig]) -> Callable[[Path], Oracle]:
    return lambda folder: make_oracle(folder, model, config())


def _checkpoint(folder: Path) -> Oracle:
    base = llama_tensors()
    tuned = nudged(base)
    deltas = {name: tuned[name].double() - base[name].double() for name in base if base[name].ndim == 2}
    return Oracle(
        write_checkpoint(folder / "base", base, shards=2), write_checkpoint(folder / "adapter", tuned), deltas
    )


def _multilora(folder: Path) -> Oracle:
    base = write_checkpoint(folder / "base", llama_tensors())
    name = "model.layers.0.self_attn.v_proj"
    torch.manual_seed(0)
    A, B, scaling = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 2, 16), (3, 8, 2), (3, 8)))
    prefix = f"base_model.model.{name}.multilora_"
    config = {"peft_type": "MULTILORA", "r": 2, "num_modules": 3, "lora_alpha": 5}
    adapter = write_adapter(folder / "adapter", {f"{prefix}A": A, f"{prefix}B": B, f"{prefix}scaling": scaling}, config)
    delta = sum(5 / 2 * scaling[i][:, None] * (B[i] @ A[i]) for i in range(3))
    return Oracle(base, adapter, {f"{name}.weight": delta})


def _multihead(folder: Path) -> Oracle:
    base = write_checkpoint(folder / "base", llama_tensors())
    name = "model.layers.1.self_attn.q_proj"
    torch.manual_seed(0)
    tensors = {"lora_A.weight": torch.randn(2, 16), "lora_route.weight": torch.randn(3, 16)}
    tensors |= {f"lora_B{k}.weight": torch.randn(16, 2) for k in range(3)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_nums": 3}
    adapter = write_adapter(
        folder / "adapter", {f"base_model.model.{name}.{key}": tensor for key, tensor in tensors.items()}, config
    )
    heads = torch.stack([tensors[f"lora_B{k}.weight"] for k in range(3)]).double()
    return Oracle(base, adapter, {f"{name}.weight": 3 * heads.mean(0) @ tensors["lora_A.weight"].double()})


EXAMPLES: dict[str, Callable[[Path], Oracle]] = {
    "checkpoint": _checkpoint,
    "lora": _peft("llama", lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])),
    "multilora": _multilora,
    "multihead": _multihead,
}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
