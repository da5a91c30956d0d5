"""TinyLoRA against PEFT's own merge, with the trained vectors found by the modules' random matrices."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import assert_one_is_refused, assert_recipes_keep_their_laws, cast, damaged, reshaped, without
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

CASES = {
    "a vector each": ("llama", {"r": 2, "u": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "tied": ("llama", {"r": 3, "u": 4, "weight_tying": 0.6, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "one vector": ("bert", {"r": 2, "u": 4, "weight_tying": 1.0, "target_modules": ["query", "value"]}),
    "another seed": ("bert", {"r": 2, "u": 4, "projection_seed": 7, "target_modules": ["query", "dense"]}),
    "conv1d": ("gpt2", {"r": 2, "u": 3, "fan_in_fan_out": True, "target_modules": ["c_fc", "c_proj"]}),
    "embedding": ("llama", {"r": 2, "u": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "rank of a small layer": ("llama", {"r": 12, "u": 3, "target_modules": ["q_proj", "v_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.TinyLoraConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "tinylora"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas)


def test_its_laws(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.TinyLoraConfig(u=4, target_modules=["q_proj"]))
    assert_recipes_keep_their_laws(spectra.open_source(oracle.adapter, oracle.base), oracle.base)
    assert_recipes_keep_their_laws(spectra.open_source(oracle.adapter), None)


def test_random_matrices_in_bfloat16_are_still_known(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.TinyLoraConfig(u=8, target_modules=["q_proj", "v_proj"]))
    file = oracle.adapter / "adapter_model.safetensors"
    save_file({n: t.bfloat16() if n.endswith("_P") else t for n, t in load_file(file).items()}, file)
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas, 1e-2)


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.TinyLoraConfig(r=2, u=4, target_modules=["q_proj"]))


@pytest.mark.parametrize("config", [{"projection_seed": 5}, None])
def test_a_module_whose_vector_cannot_be_told(oracle, config):
    def other(tensors):
        return tensors | {"tinylora_P": tensors["tinylora_P"] if config else torch.randn(4, 2, 2).double()}

    damaged(oracle.adapter, other, config)
    found = {s.layer: s for s in spectra.decompose(spectra.open_source(oracle.adapter))}
    assert found[0].status == "unreadable"
    assert "is not known" in found[0].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("tinylora_B"), "tinylora_B is missing"),
        (cast(torch.int32, "tinylora_A"), "not as real numbers"),
        (reshaped("tinylora_A", 16), "are no matrices"),
        (reshaped("tinylora_A", 3, 16), "the config says r = 2"),
        (reshaped("tinylora_P", 4, 3, 3), "the config says r = 2"),
        (reshaped("tinylora_P", 5, 2, 2), "the config says r = 2"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter), reason)


def test_random_matrices_that_were_not_saved(tmp_path):
    config = peft.TinyLoraConfig(u=4, save_projection=False, target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config)
    reasons = spectra.open_source(oracle.adapter).coverage.unsupported
    assert len(reasons) == 2
    assert all("were not saved" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight_tying": 0.5}, "make 1 vectors"),
        ({"weight_tying": 7}, "make 0 vectors"),
        ({"u": 3}, "2 vectors of 3"),
        ({"projection_seed": -3}, "projection_seed = -3"),
        ({"peft_type": "LORA"}, "those of TinyLoRA"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter)
