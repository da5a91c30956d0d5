"""Weights as the quantising libraries store and decode them: tests/files/codecs/weights.safetensors by case."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support.checkpoints import write_checkpoint

MODULE = "model.layers.0.mlp.up_proj"
_EXPERTS = {"mxfp4": "model.layers.0.mlp.experts.down_proj", "mlx experts": "model.layers.0.mlp.switch_mlp.up_proj"}
_FILE = Path(__file__).resolve().parents[1] / "files" / "codecs" / "weights.safetensors"
with safe_open(_FILE, "pt") as file:
    CONFIGS = {case: json.loads(config) for case, config in sorted(file.metadata().items())}
_STORED = load_file(_FILE)


def stored(case: str) -> dict[str, torch.Tensor]:
    """A case's tensors under a module's name."""
    mine = {name.partition("/")[2]: tensor.clone() for name, tensor in _STORED.items() if name.startswith(f"{case}/")}
    module = module_of(case)
    return {module + name if name.startswith("_") else f"{module}.{name}": tensor for name, tensor in mine.items()}


def decoded_by_library(case: str) -> torch.Tensor:
    """What the case's library decodes."""
    return _STORED[f"{case}="]


def module_of(case: str) -> str:
    """The module that a case's weight belongs to."""
    return _EXPERTS.get(case, MODULE)


def weight_of(case: str) -> str:
    """The name of a case's weight."""
    return module_of(case) if case == "mxfp4" else f"{module_of(case)}.weight"


def matrices_of(case: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The matrices of a case in a pair, by name and in Linear orientation."""
    if weight.ndim == 2:
        return {weight_of(case): weight}
    return {
        f"{weight_of(case)}[{index}]": expert.T if case == "mxfp4" else expert for index, expert in enumerate(weight)
    }


def config_of(case: str) -> dict:
    """The config of a model that holds the case."""
    return CONFIGS[case] | {"model_type": "gpt_oss" if case == "mxfp4" else "llama"}


def write_coded(folder: Path, case: str, **changed: object) -> Path:
    """The case as a checkpoint; other tensors or another config where they are given."""
    return write_checkpoint(folder, **({"tensors": stored(case), "config": config_of(case)} | changed))


def write_plain(folder: Path, case: str) -> Path:
    """A checkpoint of plain weights near those that the case's codes stand for."""
    torch.manual_seed(0)
    weight = decoded_by_library(case).float()
    moved = weight + 0.01 * torch.randn_like(weight)
    return write_checkpoint(folder, {weight_of(case): moved}, config=config_of(case))
