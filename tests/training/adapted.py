"""Tiny models with adapters whose numbers are as after some training."""

from __future__ import annotations

from typing import Any

import torch
from support.peft_oracle import tiny_model
from torch import nn

from spectra.training import MultiLoRAConfig, RLoRAConfig, inject_adapter

TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "bert": ("query", "output.dense"),
}
CONFIGS: dict[str, Any] = {
    "multilora": MultiLoRAConfig(r=2, num_modules=3, alpha=3, target_modules="0"),
    "rlora": RLoRAConfig(r=2, num_heads=3, alpha=3, head_dropout=0.0, target_modules="0"),
    "rlora routed": RLoRAConfig(r=2, num_heads=3, alpha=3, head_dropout=0.0, use_router=True, target_modules="0"),
    "rlora released": RLoRAConfig(
        r=2, num_heads=3, alpha=3, head_dropout=0.0, use_router=True, init="released", target_modules="0"
    ),
    "hydralora": RLoRAConfig.hydralora(r=2, num_heads=3, alpha=3, target_modules="0"),
}


def config_for(name: str, kind: str = "llama", **changes: Any) -> Any:
    from dataclasses import replace

    return replace(CONFIGS[name], target_modules=TARGETS[kind], **changes)


def layer(config: Any, out: int = 6, into: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """One linear layer with a fresh adapter, in a model of its own."""
    torch.manual_seed(seed)
    return inject_adapter(nn.Sequential(nn.Linear(into, out, dtype=dtype)), config)


def trained(model: nn.Module, seed: int = 1) -> Any:
    """Every trainable number moved, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def adapted_model(name: str, kind: str = "llama", **changes: Any) -> Any:
    """A tiny transformer in float64, adapted and trained."""
    return trained(inject_adapter(tiny_model(kind), config_for(name, kind, **changes)))


def tokens(rows: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits
