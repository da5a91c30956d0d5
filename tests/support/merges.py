"""Merges that PEFT makes, saved: a base, an adapter and the merged model, in the types that people have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from support.peft_oracle import save_model, tiny_model

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Merge:
    """The folders of a merge."""

    base: Path
    adapter: Path
    merged: Path

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """As `verify_merge` takes them."""
        return self.base, self.adapter, self.merged

    def weights(self, which: str) -> Tensors:
        """The tensors of the base or of the merged model."""
        return load_file(getattr(self, which) / "model.safetensors")

    def rewrite(self, which: str, change: Callable[[Tensors], object]) -> None:
        """Change the tensors of the base or of the merged model in place, and save them again."""
        tensors = self.weights(which)
        change(tensors)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, getattr(self, which) / "model.safetensors")


def peft_merge(
    folder: Path,
    config: peft.PeftConfig,
    *,
    kind: str | torch.nn.Module = "llama",
    stored: torch.dtype = torch.float32,
    loaded: torch.dtype | None = None,
    autocast: bool = True,
    safe: bool = False,
    size: float = 0.05,
    prepare: Callable[[Any], object] | None = None,
) -> Merge:
    """A tiny model with a random adapter, merged by PEFT.

    Args:
        folder: where to save the three.
        config: the adapter's.
        kind: which model.
        stored: the type of the base's file.
        loaded: the type in which the base is loaded and merged; as stored if None.
        autocast: whether PEFT keeps the adapter in float32 on a base of 16 bits, as it does by default.
        safe: `safe_merge`.
        size: of the random entries.
        prepare: may change the adapted model before it is saved.
    """
    model = tiny_model(kind) if isinstance(kind, str) else kind
    model = model.to(stored)
    save_model(folder / "base", model)
    model = model.to(loaded or stored)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                kept = parameter if _starts_elsewhere(name) else 0
                parameter.copy_(kept + torch.randn_like(parameter.float()) * size)
    if prepare:
        prepare(adapted)
    adapted.save_pretrained(folder / "adapter")
    save_model(folder / "merged", adapted.merge_and_unload(safe_merge=safe))
    return Merge(folder / "base", folder / "adapter", folder / "merged")


def _starts_elsewhere(name: str) -> bool:
    """Whether zero is not where a parameter's training starts: factors of W₀, random factors, whole weights."""
    return any(
        word in name for word in ("modules_to_save", "ia3_l", "magnitude", "lora_A", "_w1", "hra_u", "trainable_tokens")
    )
