"""A model, its tuned copy, and what an extracted LoRA does to the base when PEFT merges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from support.peft_oracle import save_model

Tensors = dict[str, torch.Tensor]


@dataclass
class Pair:
    """A base and its full fine-tune on the disk.

    Attributes:
        base: the base's folder.
        tuned: the tuned model's folder.
        before: parameter in memory → the base's, float64.
        after: the same of the tuned model.
        load: gives the base anew.
    """

    base: Path
    tuned: Path
    before: Tensors
    after: Tensors
    load: Callable[[], Any]

    def merged(self, adapter: Path) -> Tensors:
        """Parameter in memory → what merging the adapter with PEFT adds to it, without those that stay."""
        model = peft.PeftModel.from_pretrained(self.load(), adapter).merge_and_unload()
        found = {name: tensor.detach().double() - self.before[name] for name, tensor in model.state_dict().items()}
        return {name: delta for name, delta in found.items() if bool(delta.any())}

    def update(self, name: str) -> torch.Tensor:
        """ΔW of a parameter, as it lies in memory."""
        return self.after[name] - self.before[name]

    def moved(self, name: str) -> bool:
        """Whether tuning changed a parameter."""
        return bool(self.update(name).any())


def make_pair(folder: Path, make: Callable[[], Any], size: float = 0.02) -> Pair:
    """Save a model and a copy of it of which every parameter moved."""
    base, tuned = make(), make()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    for name, model in (("base", base), ("tuned", tuned)):
        _save(model, folder / name)

    def load() -> Any:
        if hasattr(base, "save_pretrained"):
            return type(base).from_pretrained(folder / "base", dtype=torch.float32)
        return make()

    return Pair(folder / "base", folder / "tuned", _state(base), _state(tuned), load)


def _save(model: Any, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_model(folder, model)


def _state(model: Any) -> Tensors:
    return {name: tensor.detach().clone().double() for name, tensor in model.state_dict().items()}


def truncated(update: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a rank, in the update's own shape; of a stack of experts, of each."""
    if update.ndim == 3:
        return torch.stack([truncated(expert, rank) for expert in update])
    U, S, Vh = torch.linalg.svd(update.reshape(update.shape[0], -1), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(update.shape)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Equal up to a share of the norm: PEFT merges in float32."""
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())
