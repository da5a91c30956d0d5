"""A tensor that no rule knows takes away the number of every module that it may act on, and of no other."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint

import spectra

ATTENTION = "model.layers.0.self_attn"
MODULES = (f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj", "model.layers.1.self_attn.q_proj")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
Q, FIRST, ALL = MODULES[:1], MODULES[:2], MODULES


def adapter(named=""):
    """Factors, under names with the adapter's or without."""
    torch.manual_seed(0)
    tensors = {}
    for module in MODULES:
        out = 8 if "v_proj" in module else 16
        for letter, shape in (("A", (2, 16)), ("B", (out, 2))):
            tensors[f"base_model.model.{module}.lora_{letter}.{named}weight"] = torch.randn(shape)
    return tensors


STRANGERS = {
    "a scalar": (f"{Q[0]}.scale", (), Q),
    "a vector": (f"{Q[0]}.lora_magnitude", (16,), Q),
    "a vector of another adapter": (f"{Q[0]}.lora_magnitude.default.weight", (16,), Q),
    "a router": (f"{Q[0]}.lora_route.weight", (3, 16), Q),
    "a mask": (f"{Q[0]}.weight_mask", (16, 16), Q),
    "joined by an underscore": (f"{Q[0]}_lora_gate.weight", (2, 2), Q),
    "nothing": (f"{Q[0]}.extra", (0,), Q),
    "a bias of nothing known": (f"{Q[0]}.lora_xs.bias", (16,), Q),
    "shared by the attention": (f"{ATTENTION}.lora_shared.weight", (2, 2), FIRST),
    "a scalar of the attention": (f"{ATTENTION}.gate", (), FIRST),
    "of the layer": ("model.layers.0.router.weight", (3, 16), FIRST),
    "global": ("lora_scale", (), ALL),
    "a bank": ("vector_bank", (4,), ALL),
}


@pytest.mark.parametrize("named", ["", "default."])
@pytest.mark.parametrize("case", STRANGERS)
def test_what_no_rule_knows(case, named, tmp_path):
    name, shape, lost = STRANGERS[case]
    tensors = adapter(named) | {f"base_model.model.{name}": torch.ones(shape)}
    source = spectra.open_source(write_adapter(tmp_path, tensors, CONFIG))
    assert {delta.name for delta in source} == {f"{module}.weight" for module in ALL}
    for delta in source:
        refused = delta.name.removesuffix(".weight") in lost
        assert delta.status == ("unsupported" if refused else "ok"), delta
        assert not refused or f"{name.rpartition('.')[2] if name.startswith(Q[0]) else name}"[:4] in delta.reason


def test_a_stranger_that_cannot_be_read_counts_as_well(tmp_path):
    last = MODULES[2]  # the last in the file, of which the end is cut off
    folder = write_adapter(tmp_path, adapter() | {f"base_model.model.{last}.zzz": torch.ones(2, 2)}, CONFIG)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    source = spectra.open_source(folder)
    assert "zzz (which cannot be read)" in source[f"{last}.weight"].reason
    assert all(source[f"{module}.weight"].status == "ok" for module in FIRST)


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", f"{Q[0]}.bias", f"{Q[0]}.base_layer.bias", f"{Q[0]}.lora_B.bias", "model.norm.bias"],
)
def test_what_is_the_models_own_costs_nothing(name, tmp_path):
    tensors = adapter() | {f"base_model.model.{name}": torch.ones(16)}
    source = spectra.open_source(write_adapter(tmp_path, tensors, CONFIG))
    assert [delta.status for delta in source] == ["ok"] * 3
    assert name in source.coverage.skipped


def test_what_the_base_holds_is_the_models_own(tmp_path):
    name = "model.layers.0.mlp.router.weight"  # else taken for a part of an adapter
    base = write_checkpoint(tmp_path / "base", llama_tensors() | {name: torch.ones(3, 16)})
    tensors = adapter() | {f"base_model.model.{name}": torch.ones(3, 16)}
    config = CONFIG | {"modules_to_save": ["router"]}
    for place, (given, root) in enumerate(((CONFIG, base), (config, None), (config, base))):
        source = spectra.open_source(write_adapter(tmp_path / str(place), tensors, given), root)
        assert all(source[f"{module}.weight"].status == "ok" for module in MODULES)
