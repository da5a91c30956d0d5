"""Today's way: what a user writes without this toolkit. As functions, and as scripts: `python -m benchmarks.peers`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def svdvals(matrices: Sequence[Tensor]) -> list[Tensor]:
    """torch.linalg.svdvals in float32, one after another."""
    return [torch.linalg.svdvals(matrix) for matrix in matrices]


def svd(matrices: Sequence[Tensor]) -> list[Tensor]:
    """torch.linalg.svd in float32, one after another."""
    return [torch.linalg.svd(matrix, full_matrices=False)[1] for matrix in matrices]


def product_svd(left: Tensor, right: Tensor) -> Tensor:
    """The product formed, then torch.linalg.svd in float32."""
    return torch.linalg.svd(left.float() @ right.float(), full_matrices=False)[1]


def read_both(base: str, merged: str) -> None:
    """Every weight of two models, brought from their files into memory."""
    from safetensors.torch import load

    for file in sorted(Path(base).glob("*.safetensors")):
        for folder in (base, merged):
            load((Path(folder) / file.name).read_bytes())


def lora_script(folder: str, top: int) -> None:
    """QR of the factors and the SVD of the core: the honest peer for adapters."""
    from safetensors import safe_open

    path = Path(folder)
    config = json.loads((path / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    kept = {}
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        for name in sorted(key for key in file.keys() if ".lora_A." in key):  # noqa: SIM118
            right = file.get_tensor(name).float()
            left = scale * file.get_tensor(name.replace(".lora_A.", ".lora_B.")).float()
            q_left, t_left = torch.linalg.qr(left)
            q_right, t_right = torch.linalg.qr(right.T)
            u, s, vh = torch.linalg.svd(t_left @ t_right.T)
            kept[name] = s, q_left @ u[:, :top], vh[:top] @ q_right.T


def multilora_script(folder: str, top: int) -> None:
    """The same for a MultiLoRA, its modules side by side."""
    from safetensors import safe_open

    path = Path(folder)
    config = json.loads((path / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    kept = {}
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        for name in sorted(key for key in file.keys() if key.endswith("_A")):  # noqa: SIM118
            right = file.get_tensor(name).float().flatten(0, 1)
            scaling = file.get_tensor(f"{name[:-2]}_scaling").float()
            left = (scale * scaling[:, :, None] * file.get_tensor(f"{name[:-2]}_B").float()).transpose(0, 1).flatten(1)
            q_left, t_left = torch.linalg.qr(left)
            q_right, t_right = torch.linalg.qr(right.T)
            u, s, vh = torch.linalg.svd(t_left @ t_right.T)
            kept[name] = s, q_left @ u[:, :top], vh[:top] @ q_right.T


def values_script(base: str, tuned: str) -> None:
    """Load both models, subtract, torch.linalg.svdvals."""
    from safetensors.torch import load_file

    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (base, tuned))
    for name, weight in before.items():
        if name.startswith("encoder.") and weight.ndim == 2:
            torch.linalg.svdvals(after[name] - weight)


def pair_script(base: str, tuned: str) -> None:
    """Subtract in float32 and decompose, shard by shard."""
    from safetensors import safe_open

    weight_map = json.loads((Path(base) / "model.safetensors.index.json").read_text())["weight_map"]
    for name, shard in weight_map.items():
        weights = []
        for folder in (tuned, base):
            with safe_open(Path(folder) / shard, "pt") as file:
                weights.append(file.get_tensor(name).float())
        torch.linalg.svd(weights[0] - weights[1], full_matrices=False)


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    if what in ("lora", "multilora"):
        (lora_script if what == "lora" else multilora_script)(*paths, top=30)
    else:
        (pair_script if what == "pair" else values_script)(*paths)
