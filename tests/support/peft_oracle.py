"""The oracle for adapters: PEFT's own merge, minus the base, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "bert": (
        "BertForSequenceClassification",
        {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 32},
    ),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 32},
    ),
}  # fmt: skip


def tiny_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random float64 model of a few thousand parameters."""
    torch.manual_seed(seed)
    name, options = _CONFIGS[kind]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


class Convolutions(torch.nn.Module):
    """Convolutions in two and one dimensions, with groups and 1×1, and a linear layer, random float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.two = torch.nn.Conv2d(6, 8, (3, 2))
        self.one = torch.nn.Conv1d(6, 8, 3)
        self.point = torch.nn.Conv2d(6, 8, 1)
        self.grouped = torch.nn.Conv2d(6, 8, 3, groups=2)
        self.linear = torch.nn.Linear(6, 8)
        self.double().eval()


@dataclass
class Oracle:
    """A saved base, a saved adapter, and what PEFT's merge does to each weight.

    Attributes:
        base: folder with the base's weights.
        adapter: folder with the adapter.
        deltas: weight name → merged − base in Linear orientation, for matrices that changed.
        tolerance: how far ΔW may be off, relative to its norm; more than rounding only where the
            oracle itself computes in float32.
    """

    base: Path
    adapter: Path
    deltas: dict[str, torch.Tensor]
    tolerance: float = 1e-12


def make_oracle(
    folder: Path,
    kind: str | torch.nn.Module,
    config: peft.PeftConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    prepare: Callable[[Any], None] | None = None,
) -> Oracle:
    """Wrap a tiny model, give every adapter parameter random values, save it, merge it and subtract.

    `kind` may be a model itself; `prepare` may change the adapted model before it is saved.
    """
    model = tiny_model(kind, seed) if isinstance(kind, str) else kind
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_model(folder / "base", model)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter) * 0.3
                parameter.copy_((parameter + noise if "modules_to_save" in name else noise).to(dtype))
    if prepare:
        prepare(adapted)
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    deltas = {}
    for name, before in base.items():
        delta = merged[name].double() - before
        if delta.ndim >= 2 and bool(delta.any()):
            deltas[name] = delta.T if name in conv1d else delta.reshape(delta.shape[0], -1)
    return Oracle(folder / "base", folder / "adapter", deltas)


def save_model(folder: Path, model: torch.nn.Module) -> Path:
    """Weights in the model's own names and its config, tied tensors once."""
    folder.mkdir(parents=True)
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.clone().contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": getattr(getattr(model, "config", None), "model_type", "")})
    )
    return folder


def assert_matches(source: Any, deltas: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    """The source holds exactly these updates, each equal to the oracle's to rounding."""
    got = {delta.name: delta for delta in source}
    assert set(got) == set(deltas)
    for name, expected in deltas.items():
        actual = got[name].read().to_dense()
        assert tuple(actual.shape) == got[name].shape == tuple(expected.shape), name
        assert torch.allclose(actual, expected, rtol=0, atol=tolerance * float(expected.norm())), name
