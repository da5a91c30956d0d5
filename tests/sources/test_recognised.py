"""An adapter is never called full weights, and never passes for a base."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint

import spectra
from spectra.errors import SelectionError, SourceError
from spectra.models.opening import open_model
from spectra.sources import format_of

FACTORS = {f"layers.0.q_proj.lora_{side}.weight": torch.randn(2, 2) for side in "AB"}
UNKNOWN = {"layers.0.q_proj.down": torch.randn(2, 4), "layers.0.q_proj.up": torch.randn(4, 2)}


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors"],
)
def test_a_file_that_is_named_as_an_adapters_is_no_full_weights(tmp_path, name):
    save_file(UNKNOWN, tmp_path / name)
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    for arguments in ((tmp_path,), (tmp_path, base)):
        with pytest.raises(SourceError) as caught:
            spectra.open_source(*arguments)
        assert "full weights" not in str(caught.value)
        assert "adapter" in str(caught.value)


def test_factors_that_cannot_be_read_are_an_adapters(tmp_path):
    folder = write_adapter(tmp_path, FACTORS, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    file = folder / "adapter_model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[: 8 + length])  # the header alone
    source = spectra.open_source(folder)
    assert (source.kind, [delta.status for delta in source]) == ("lora", ["unreadable"])
    assert "truncated" in source.deltas[0].reason
    (folder / "adapter_config.json").unlink()
    file.rename(folder / "model.safetensors")
    assert format_of(open_model(folder)).kind == "lora"


@pytest.mark.parametrize("config", [None, {"peft_type": "LORA", "r": 2, "lora_alpha": 2}])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.safetensors"])
def test_an_adapter_is_no_base(tmp_path, name, config):
    tuned = write_checkpoint(tmp_path / "tuned", llama_tensors())
    adapter = write_adapter(tmp_path / "adapter", FACTORS, config)
    (adapter / "adapter_model.safetensors").rename(adapter / name)
    with pytest.raises(SelectionError, match="is an adapter, not a base model"):
        spectra.open_source(tuned, adapter)


def test_a_model_that_mentions_adapters_is_a_model(tmp_path):
    tensors = llama_tensors(layers=1) | {"model.adapter.weight": torch.eye(4), "score.down.weight": torch.eye(4)}
    folder = write_checkpoint(tmp_path / "a", tensors)
    assert format_of(open_model(folder)).kind == "checkpoint"
    (folder / "model.safetensors").rename(folder / "my_adapter_model.safetensors")
    assert format_of(open_model(folder)).kind == "checkpoint"
