"""MultiLoRA and R-LoRA as torch modules: inject, train, save, load, merge.

Needs torch alone, and makes the files that the analysis reads.

    >>> from torch import nn
    >>> from spectra.adapters import MultiLoRAConfig, inject_adapter, merge_adapter
    >>> model = inject_adapter(nn.Sequential(nn.Linear(4, 4)), MultiLoRAConfig(r=2, num_modules=3, alpha=4))
    >>> sum(parameter.requires_grad for parameter in model.parameters())
    3
    >>> list(merge_adapter(model).state_dict())
    ['0.weight', '0.bias']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectra.training.config import AdapterError, MultiLoRAConfig, RLoRAConfig
from spectra.training.inject import inject_adapter
from spectra.training.merge import merge_adapter, unmerge_adapter
from spectra.training.multilora import MultiLoRA
from spectra.training.rlora import RLoRA
from spectra.training.save import load_adapter, save_adapter
from spectra.training.watch import Watch

if TYPE_CHECKING:
    from spectra.training.trainer import WatchSpectra as WatchSpectra

__all__ = [
    "AdapterError",
    "MultiLoRA",
    "MultiLoRAConfig",
    "RLoRA",
    "RLoRAConfig",
    "Watch",
    "inject_adapter",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "unmerge_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "WatchSpectra":  # needs transformers, which nothing else here does
        from spectra.training.trainer import WatchSpectra

        return WatchSpectra
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
