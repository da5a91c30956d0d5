"""AdapterHub's LoRA, and a PEFT folder whose weights file has another name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.errors import SourceError, UnsupportedFormatError

MODULE = "bert.encoder.layer.0.attention.self.query"
LORA = {"architecture": "lora", "r": 2, "alpha": 4, "composition_mode": "add", "use_gating": False}


def factors(name="mine", rows=2):
    torch.manual_seed(0)
    return {f"{MODULE}.loras.{name}.lora_A": torch.randn(rows, 16), f"{MODULE}.loras.{name}.lora_B": torch.randn(16, 2)}


def write(folder, tensors, inner):
    torch.save(tensors, folder / "pytorch_adapter.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"config": inner, "model_type": "bert", "name": "mine"}))
    return folder


def test_s_is_alpha_over_r_of_the_config_inside(tmp_path):
    A, B = (tensor.double() for tensor in factors().values())
    (found,) = spectra.open_source(write(tmp_path, factors(), LORA))
    assert found.name == f"{MODULE}.weight"
    assert torch.allclose(found.read().to_dense(), 2 * B @ A, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"composition_mode": "scale"}, "multiplies the weights"),
        ({"use_gating": True}, "anew for every input"),
        ({"architecture": "bottleneck"}, "architecture 'bottleneck'"),
        ({"vera_d": 0.1}, "VeRA"),
    ],
)
def test_what_is_no_product_of_two_factors_is_refused(changed, words, tmp_path):
    with pytest.raises(UnsupportedFormatError, match=words):
        spectra.open_source(write(tmp_path, factors(), LORA | changed))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (factors(rows=6), "factors of their own"),
        (factors(rows=5), "cannot be multiplied"),
        (factors() | {f"{MODULE}.loras.mine.m.weight": torch.ones(16, 1)}, "m.weight"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused(tensors, words, tmp_path):
    (found,) = spectra.open_source(write(tmp_path, tensors, LORA))
    assert words in found.reason


def test_two_adapters_in_one_file_are_not_added_up(tmp_path):
    with pytest.raises(SourceError, match=r"several adapters \(mine, other\)"):
        spectra.open_source(write(tmp_path, factors() | factors("other"), LORA))


def test_a_peft_folder_whose_weights_file_was_renamed_is_read_with_its_config(tmp_path):
    torch.manual_seed(0)
    A, B = torch.randn(2, 16), torch.randn(16, 2)
    stored = f"base_model.model.{MODULE}"
    save_file({f"{stored}.lora_A.weight": A, f"{stored}.lora_B.weight": B}, tmp_path / "my-style-lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (found,) = spectra.open_source(tmp_path)
    assert torch.allclose(found.read().to_dense(), 2 * B.double() @ A.double(), rtol=0, atol=1e-12)
