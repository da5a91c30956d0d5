"""Files for image tools: flat names that stand for the base's weights, read back to the same ΔW."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.extracted import truncated
from support.pipeline import pipeline
from support.tiny_models import tiny_model

import spectra
from spectra.errors import SelectionError


@pytest.fixture
def diffusion(tmp_path):
    """A pipeline of which every component was tuned, with its updates by the weights' names."""
    base, before = pipeline(tmp_path / "base")
    tuned, after = pipeline(tmp_path / "tuned")
    torch.manual_seed(9)
    for component in ("unet", "text_encoder", "text_encoder_2"):
        (file,) = (tuned / component).glob("*.safetensors")
        tensors = {name: tensor + torch.randn_like(tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file)
        after |= {f"{component}.{name}": tensor for name, tensor in tensors.items()}
    return base, tuned, {name: after[name] - before[name] for name in before}


def test_every_component_and_convolution_is_read_back(diffusion, tmp_path):
    base, tuned, updates = diffusion
    source = spectra.open_source(tuned, base)
    table = spectra.extract(source, tmp_path / "out", rank=2, format="kohya", dtype="float64")
    back = spectra.open_source(tmp_path / "out", base)
    assert back.kind == "kohya"
    assert not back.coverage.warnings
    assert {delta.name for delta in back} == set(table["name"])
    for delta in back:
        update = updates[delta.name].flatten(1)
        assert torch.allclose(delta.read().to_dense(), truncated(update, 2), atol=1e-9)
    with safe_open(tmp_path / "out" / "adapter.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata()["ss_network_dim"] == "2"
        down = file.get_tensor("lora_unet_mid_block_conv.lora_down.weight")
    assert down.shape == (2, 5, 3, 3)
    for flat in ("lora_te1_text_model", "lora_te2_text_model", "lora_unet_down_blocks_0_attentions_0_to_out_0"):
        assert any(name.startswith(flat) for name in names), flat


def test_peft_takes_one_component(diffusion, tmp_path):
    base, tuned, _ = diffusion
    source = spectra.open_source(tuned, base)
    with pytest.raises(SelectionError, match="of one model, and these are text_encoder and text_encoder_2 and unet"):
        spectra.extract(source, tmp_path / "out", rank=1)
    spectra.extract(source.select("re:^unet"), tmp_path / "out", rank=1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "mid_block.conv" in config["target_modules"]


def test_embeddings_are_listed_and_a_transposed_base_is_read_back(tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        tiny_model("GPT2LMHeadModel", "gpt2", seed, n_embd=16, n_layer=1, n_head=2, n_positions=8).save_pretrained(
            tmp_path / name
        )
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base", split=False)
    table = spectra.extract(source, tmp_path / "out", rank=3, format="kohya", dtype="float64")
    assert "linear layers and convolutions only" in table.attrs["not_carried"]["transformer.wte.weight"]
    back = spectra.open_source(tmp_path / "out", tmp_path / "base", split=False)
    assert {delta.name for delta in back} == set(table["name"])
    for delta in back:
        assert torch.allclose(delta.read().to_dense(), truncated(source[delta.name].read().to_dense(), 3), atol=1e-9)


def test_a_file_without_its_base_keeps_its_flat_names_and_is_none_of_pefts(diffusion, tmp_path):
    base, tuned, _ = diffusion
    source = spectra.open_source(tuned, base)
    spectra.extract(source, tmp_path / "large", rank=3, format="kohya")
    large = spectra.open_source(tmp_path / "large")
    spectra.extract(large, tmp_path / "small", rank=2, format="kohya")
    names = [
        {name for name in load_file(tmp_path / size / "adapter.safetensors") if "mid_block" not in name}
        for size in ("large", "small")
    ]
    assert names[0] == names[1]
    with pytest.raises(SelectionError, match="pass the base"):
        spectra.extract(large, tmp_path / "out", rank=1)
    with pytest.raises(SelectionError, match="keep no module whole"):
        spectra.extract(large, tmp_path / "out", rank=1, format="kohya", save_modules=True)
