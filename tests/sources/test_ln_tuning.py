"""LN tuning holds vectors: said so, with the matrices beside them read."""

from __future__ import annotations

import peft
import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import BaseRequiredError, UnsupportedFormatError


@pytest.mark.parametrize(("kind", "norms"), [("llama", ["input_layernorm"]), ("gpt2", ["ln_1", "ln_f"])])
def test_norms_alone_are_refused_with_the_reason(tmp_path, kind, norms):
    oracle = make_oracle(tmp_path, kind, peft.LNTuningConfig(target_modules=norms))
    assert not oracle.deltas
    with pytest.raises(UnsupportedFormatError, match="vectors and no matrix"):
        spectra.open_source(oracle.adapter, oracle.base)


def test_a_head_saved_beside_them_is_read(tmp_path):
    # PEFT's own merge loses the head here, so the difference is taken by hand.
    model = llama_tensors()
    head = torch.randn(model["lm_head.weight"].shape)
    norms = {
        f"base_model.model.model.layers.{i}.input_layernorm.ln_tuning_layers.weight": torch.ones(16) for i in (0, 1)
    }
    config = {"peft_type": "LN_TUNING", "modules_to_save": ["lm_head"]}
    write_adapter(tmp_path / "adapter", norms | {"base_model.model.lm_head.weight": head}, config)
    source = spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", model))
    assert source.kind == "ln_tuning"
    assert_matches(source, {"lm_head.weight": head.double() - model["lm_head.weight"].double()})
    assert "a vector" in source.coverage.skipped["model.layers.0.input_layernorm.weight"]
    assert len(source.coverage.skipped) == 2
    with pytest.raises(BaseRequiredError, match=r"lm_head.weight: saved whole, .* pass base="):
        spectra.open_source(tmp_path / "adapter")


def test_biases_and_something_that_is_no_norm_are_listed(tmp_path):
    tensors = {
        "base_model.model.norm.ln_tuning_layers.weight": torch.ones(4),
        "base_model.model.norm.ln_tuning_layers.bias": torch.ones(4),
        "base_model.model.dense.ln_tuning_layers.weight": torch.ones(4, 4),
    }
    write_adapter(tmp_path / "adapter", tensors, {"peft_type": "LN_TUNING"})
    base = write_checkpoint(tmp_path / "base", {"norm.weight": torch.ones(4), "dense.weight": torch.zeros(4, 4)})
    source = spectra.open_source(tmp_path / "adapter", base)
    assert set(source.coverage.skipped) == {"norm.weight", "norm.ln_tuning_layers.bias"}
    assert [(delta.name, delta.status) for delta in source] == [("dense.weight", "unsupported")]
