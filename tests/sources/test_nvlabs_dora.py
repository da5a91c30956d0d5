"""The DoRA authors' own files: the magnitude alone, both spellings of the config, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from support.checkpoints import write_adapter
from support.examples import EXAMPLES
from support.stored import rewritten, stored_tensors

import spectra
from spectra.errors import SourceError

DOWN, Q = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def oracle(tmp_path):
    return EXAMPLES["nvlabs_dora"](tmp_path)


def with_config(oracle, **options):
    file = oracle.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return spectra.open_source(oracle.adapter, oracle.base)


@pytest.mark.parametrize(
    "options",
    [
        {"Wdecompose_target_modules": None, "wdecompose_target_modules": ["mlp.down_proj"]},
        {"Wdecompose_target_modules": r".*\.(up|down)_proj"},
    ],
)
def test_the_config_says_which_modules_have_a_magnitude_only(options, oracle):
    found = with_config(oracle, **options)[DOWN].read().to_dense()
    assert torch.allclose(found, oracle.deltas[DOWN], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", [None, ["up_proj"], r"down_proj", 5])
def test_a_magnitude_without_factors_that_the_config_does_not_expect_is_refused(wanted, oracle):
    source = with_config(oracle, Wdecompose_target_modules=wanted)
    assert "lora_A is missing" in source[DOWN].reason
    assert source[Q].status == "ok"


def test_factors_that_the_config_expects_are_missed_beside_a_magnitude(oracle):
    assert "lora_A is missing" in with_config(oracle, target_modules=["down_proj", "q_proj"])[DOWN].reason


@pytest.mark.parametrize("pattern", ["(", r"(a|[a-z0-9_.]|.)+[!?]"])
def test_a_pattern_that_cannot_be_used_is_an_error(pattern, oracle):
    with pytest.raises(SourceError, match="cannot be used"):
        with_config(oracle, Wdecompose_target_modules=pattern)


def test_weights_turned_round_are_refused(oracle):
    with pytest.raises(SourceError, match="fan_in_fan_out"):
        with_config(oracle, fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("weight_m_wdecomp", torch.ones(5, 1), "the DoRA magnitude"),
        ("lora_B", torch.ones(16, 4), "cannot be multiplied"),
        ("lora_B", torch.ones(9, 3), "the base weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, tensor, words, oracle, tmp_path):
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"
    folder = rewritten(oracle.adapter, tmp_path / "other", stored_tensors(oracle.adapter) | {key: tensor})
    assert words in spectra.open_source(folder, oracle.base)[Q].reason


def test_a_file_of_factors_alone_under_this_peft_type_is_an_error(oracle, tmp_path):
    tensors = {name: tensor for name, tensor in stored_tensors(oracle.adapter).items() if "lora_" in name}
    folder = write_adapter(
        tmp_path / "other", tensors, json.loads((oracle.adapter / "adapter_config.json").read_text())
    )
    with pytest.raises(SourceError, match="peft_type 'DORA'"):
        spectra.open_source(folder, oracle.base)
