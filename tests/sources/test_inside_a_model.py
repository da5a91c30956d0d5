"""PEFT around one part of a model: the factors lie under `<part>.base_model.model.`, other weights beside it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint

import spectra

V = "model.layers.0.self_attn.v_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["v_proj"]}


@pytest.fixture
def factors():
    torch.manual_seed(0)
    return {
        f"llm.base_model.model.{V}.lora_A.default.weight": torch.randn(2, 16),
        f"llm.base_model.model.{V}.lora_B.default.weight": torch.randn(8, 2),
    }


def product(factors):
    A, B = (tensor.double() for tensor in factors.values())
    return 2 * B @ A


@pytest.mark.parametrize("part", ["", "llm."])
def test_the_base_is_the_part_or_the_whole_model(part, factors, tmp_path):
    base = write_checkpoint(tmp_path / "base", {f"{part}{name}": tensor for name, tensor in llama_tensors().items()})
    (found,) = spectra.open_source(write_adapter(tmp_path / "a", factors, CONFIG), base)
    assert found.name == f"{part}{V}.weight"
    assert torch.equal(found.read().to_dense(), product(factors))
    assert torch.equal(found.base.read(), llama_tensors()[f"{V}.weight"].double())


def test_without_a_base_the_name_is_that_in_the_whole_model(factors, tmp_path):
    (found,) = spectra.open_source(write_adapter(tmp_path / "a", factors, CONFIG))
    assert found.name == f"llm.{V}.weight"


def test_weights_outside_the_part_are_saved_whole(factors, tmp_path):
    outside = {"projector.weight": torch.randn(4, 4), "query_tokens": torch.randn(1, 3, 4)}
    adapter = write_adapter(tmp_path / "a", factors | outside, CONFIG)
    held = {f"llm.{name}": tensor for name, tensor in llama_tensors().items()} | {"projector.weight": torch.ones(4, 4)}
    source = spectra.open_source(adapter, write_checkpoint(tmp_path / "base", held))
    assert torch.equal(source["projector.weight"].read().to_dense(), outside["projector.weight"].double() - 1)
    assert torch.equal(source[f"llm.{V}.weight"].read().to_dense(), product(factors))
    alone = spectra.open_source(adapter, write_checkpoint(tmp_path / "part", llama_tensors()))
    assert set(alone.coverage.tuned_only) == {"projector.weight", "query_tokens"}
    assert alone[f"{V}.weight"].status == "ok"


def test_a_part_of_an_adapter_outside_is_still_none_that_is_known(factors, tmp_path):
    adapter = write_adapter(tmp_path / "a", factors | {"lora_router.weight": torch.ones(2, 2)}, CONFIG)
    assert spectra.open_source(adapter)[f"llm.{V}.weight"].status == "unsupported"


def test_a_whole_model_with_its_base_inside_is_compared_with_the_part(factors, tmp_path):
    weights = llama_tensors()
    whole = {f"llm.base_model.model.{name}": tensor for name, tensor in weights.items() if name != f"{V}.weight"}
    whole |= factors | {f"llm.base_model.model.{V}.base_layer.weight": weights[f"{V}.weight"]}
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(whole | {"vision.proj.weight": torch.randn(4, 4)}, folder / "model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    source = spectra.open_source(folder, write_checkpoint(tmp_path / "base", weights))
    assert torch.equal(source[f"{V}.weight"].read().to_dense(), product(factors))
    assert set(source.coverage.tuned_only) == {"vision.proj.weight"}
    changed = [delta.name for delta in source if delta.read().to_dense().any()]
    assert changed == [f"{V}.weight"]
