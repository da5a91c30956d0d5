"""LoRA-XS, LoRA-SB and Fed-SB: R (r, r) between frozen factors, beside the module under an odd name."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.peft_oracle import assert_matches

import spectra

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
SAVED, STATE = "_lora_latent_mapping", ".default_lora_latent_mapping"


def latent(ending=SAVED, named=""):
    """The tensors of two modules, and s·B·R·A of each."""
    torch.manual_seed(0)
    tensors, updates = {}, {}
    for module, (out, inside) in zip(MODULES, ((16, 16), (16, 24)), strict=True):
        A, B, R = torch.randn(3, inside), torch.randn(out, 3), torch.randn(3, 3)
        tensors[f"base_model.model.{module}.lora_A.{named}weight"] = A
        tensors[f"base_model.model.{module}.lora_B.{named}weight"] = B
        tensors[f"base_model.model.{module}{ending}.weight"] = R
        updates[f"{module}.weight"] = 2 * B.double() @ R.double() @ A.double()
    return tensors, updates


@pytest.mark.parametrize(("ending", "named"), [(SAVED, ""), (STATE, "default."), (STATE, ""), (SAVED, "default.")])
def test_the_mixer_stands_between_the_factors(ending, named, tmp_path):
    tensors, updates = latent(ending, named)
    adapter = write_adapter(tmp_path / "adapter", tensors, CONFIG)
    for base in (None, write_checkpoint(tmp_path / "base", llama_tensors())):
        source = spectra.open_source(adapter, base)
        assert source.kind == "lora"
        assert_matches(source, updates)
        assert all(delta.factored and delta.max_rank == 3 for delta in source)


@pytest.mark.parametrize("R", [torch.randn(2, 2), torch.randn(3), torch.ones(3, 3, dtype=torch.int32)])
def test_a_mixer_that_does_not_fit_is_refused(R, tmp_path):
    tensors, updates = latent()
    tensors[f"base_model.model.{MODULES[0]}{SAVED}.weight"] = R
    first, second = sorted(spectra.open_source(write_adapter(tmp_path, tensors, CONFIG)), key=lambda delta: delta.name)
    assert "lora_latent_mapping" in first.reason
    assert torch.allclose(second.read().to_dense(), updates[second.name], rtol=0, atol=1e-12)


def test_a_mixer_that_is_missing_or_cannot_be_read_costs_its_module_the_number(tmp_path):
    tensors, updates = latent()
    last = f"base_model.model.{MODULES[1]}{SAVED}.weight"  # the last in the file
    rest = {name: tensor for name, tensor in tensors.items() if name != last}
    missing = write_adapter(tmp_path / "missing", rest, CONFIG)
    cut = write_adapter(tmp_path / "cut", tensors, CONFIG)
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    for folder, status in ((missing, "unsupported"), (cut, "unreadable")):
        found = {delta.name: delta for delta in spectra.open_source(folder)}
        assert found[f"{MODULES[1]}.weight"].status == status
        name = f"{MODULES[0]}.weight"
        assert torch.allclose(found[name].read().to_dense(), updates[name], rtol=0, atol=1e-12)


def test_two_of_them_are_refused(tmp_path):
    tensors, _ = latent()
    tensors[f"base_model.model.{MODULES[0]}.lora_AB.weight"] = torch.randn(3, 3)
    source = spectra.open_source(write_adapter(tmp_path, tensors, CONFIG))
    assert source[f"{MODULES[0]}.weight"].status == "unsupported"
