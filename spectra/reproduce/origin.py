"""What a MultiLoRA update would be had only its scaling been trained: how much of its shape was there from the start?

A and B start random and full of small, equal directions, and the scaling s starts at zero. With A and B as
they started and s as it ended, the update's spectrum is that of the random start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spectra.reproduce.base import load_model
from spectra.reproduce.folders import whole_folder
from spectra.reproduce.methods import attach
from spectra.reproduce.plan import Run
from spectra.reproduce.train import snapshot
from spectra.training import MultiLoRA, load_adapter, save_adapter


def origin_of(directory: Path, run: Run, step: int) -> Path:
    """Where it is kept, beside the snapshot."""
    return snapshot(directory, run, step).with_name(f"step-{step}-origin")


def save_origin(run: Run, step: int, base: Path, directory: Path) -> None:
    """Make the adapter as `train` began with it, take over the trained scaling, save; done once."""
    target = origin_of(directory, run, step)
    if target.is_dir():
        return
    trained = load_adapter(load_model(base, "cpu")[0], snapshot(directory, run, step))
    torch.manual_seed(run.seed)
    started = attach(load_model(base, "cpu")[0], run.method)
    with torch.no_grad():
        for name, module in _adapters(started).items():
            module.multilora_scaling.copy_(_adapters(trained)[name].multilora_scaling)
    with whole_folder(target) as partial:
        save_adapter(started, partial)


def _adapters(model: Any) -> dict[str, MultiLoRA]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MultiLoRA)}
