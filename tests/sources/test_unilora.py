"""Uni-LoRA with its places saved against PEFT's own merge; without them it is refused."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import assert_one_is_refused, assert_recipes_keep_their_laws, cast, damaged, reshaped, without
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError, UnsupportedFormatError

CASES = {
    "llama": ("llama", {"r": 3, "theta_d_length": 50, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "more than entries": ("bert", {"r": 2, "theta_d_length": 500, "target_modules": ["query"]}),
    "conv1d": ("gpt2", {"r": 2, "theta_d_length": 40, "fan_in_fan_out": True, "target_modules": ["c_fc", "c_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.UniLoraConfig(**options, save_indices=True))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "unilora"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, None if kind == "gpt2" else oracle.base)
    assert not source.coverage.unsupported
    assert not source.coverage.skipped
    assert not source.coverage.tuned_only
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas)


def test_without_its_places_it_is_refused(tmp_path):
    config = peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config)
    with pytest.raises(UnsupportedFormatError, match="save it again with save_indices=True"):
        spectra.open_source(oracle.adapter)


@pytest.fixture
def oracle(tmp_path):
    config = peft.UniLoraConfig(r=4, theta_d_length=50, save_indices=True, target_modules=["q_proj"])
    return make_oracle(tmp_path, "llama", config)


@pytest.mark.parametrize("place", [-1, 50])
def test_a_place_outside_of_the_vector(oracle, place):
    def move(tensors):
        tensors["unilora_indices_A"][1, 2] = place
        return tensors

    damaged(oracle.adapter, move)
    found = {s.layer: s for s in spectra.decompose(spectra.open_source(oracle.adapter))}
    assert found[0].status == "unreadable"
    assert "outside of the vector of 50" in found[0].reason
    assert found[1].status == "ok"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("unilora_scales_A"), "unilora_scales_A is missing"),
        (without("unilora_indices_B"), "unilora_indices_B of"),
        (cast(torch.float32, "unilora_indices_A"), "unilora_indices_A of"),
        (cast(torch.int32, "unilora_scales_B"), "not as real numbers"),
        (reshaped("unilora_scales_A", 16, 4), "the config says r = 4"),
        (lambda t: {n: x[:3] if n.endswith("A") else x for n, x in t.items()}, "the config says r = 4"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter), reason)


def test_a_vector_of_integers(oracle):
    file = oracle.adapter / "adapter_model.safetensors"
    save_file({n: t.int() if "theta" in n else t for n, t in load_file(file).items()}, file)
    with pytest.raises(SourceError, match="does not hold one vector"):
        spectra.open_source(oracle.adapter)


@pytest.mark.parametrize(("config", "message"), [({"r": 0}, "r = 0"), ({"peft_type": "LORA"}, "those of Uni-LoRA")])
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter)
