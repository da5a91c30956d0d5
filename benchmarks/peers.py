"""Today's way: what a user writes without this toolkit. As functions, and as scripts: `python -m benchmarks.peers`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
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


def lora_script(folder: str, device: str = "cpu", *, top: int) -> None:
    """QR of the factors and the SVD of the core: the honest peer for adapters."""
    from safetensors import safe_open

    path = Path(folder)
    config = json.loads((path / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    kept = {}
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        for name in sorted(key for key in file.keys() if ".lora_A." in key):  # noqa: SIM118
            right = file.get_tensor(name).to(device).float()
            left = scale * file.get_tensor(name.replace(".lora_A.", ".lora_B.")).to(device).float()
            q_left, t_left = torch.linalg.qr(left)
            q_right, t_right = torch.linalg.qr(right.T)
            u, s, vh = torch.linalg.svd(t_left @ t_right.T)
            kept[name] = [part.cpu() for part in (s, q_left @ u[:, :top], vh[:top] @ q_right.T)]


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


def pair_script(base: str, tuned: str, device: str = "cpu") -> None:
    """Subtract in float32 and decompose, shard by shard."""
    from safetensors import safe_open

    weight_map = json.loads((Path(base) / "model.safetensors.index.json").read_text())["weight_map"]
    for name, shard in weight_map.items():
        weights = []
        for folder in (tuned, base):
            with safe_open(Path(folder) / shard, "pt") as file:
                weights.append(file.get_tensor(name).to(device).float())
        u, s, vh = torch.linalg.svd(weights[0] - weights[1], full_matrices=False)
        (u[:, :30].cpu(), s.cpu(), vh[:30].cpu())


def weightwatcher_script(base: str, tuned: str) -> None:
    """WeightWatcher's analysis of the update: values of each layer, and a power law fitted to them."""
    from transformers import AutoModel
    from weightwatcher import WeightWatcher

    before, after = (AutoModel.from_pretrained(folder) for folder in (base, tuned))
    details = WeightWatcher().analyze(model=after, base_model=before)
    print(len(details), "layers")


def peft_script(base: str, adapter: str) -> None:
    """Each module's update as PEFT forms it, then torch.linalg.svdvals."""
    from peft import PeftModel
    from transformers import AutoModel

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter)
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            torch.linalg.svdvals(module.get_delta_weight("default").float())


_SCRIPTS = {
    "lora": partial(lora_script, top=30),
    "multilora": partial(multilora_script, top=30),
    "values": values_script,
    "pair": pair_script,
    "weightwatcher": weightwatcher_script,
    "peft": peft_script,
}

if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    _SCRIPTS[what](*paths)
