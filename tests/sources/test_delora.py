"""DeLoRA against PEFT's own merge."""

from __future__ import annotations

import peft
import pytest
import torch
from support.adapters import (
    assert_an_unknown_tensor_is_refused,
    assert_one_is_refused,
    assert_recipes_keep_their_laws,
    cast,
    damaged,
    reshaped,
    without,
)
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

CASES = {
    "llama": ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "bert": ("bert", {"r": 2, "delora_lambda": 7, "target_modules": ["query"]}),
    "pattern": ("llama", {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.DeloraConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "delora"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert not source.coverage.unsupported
    assert not source.coverage.skipped
    alone = spectra.open_source(oracle.adapter)
    assert_matches(alone, oracle.deltas)
    assert_recipes_keep_their_laws(alone, None)


def test_vectors_shorter_than_the_shortest_are_not_blown_up(tmp_path):
    def shrink(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "delora_B" in name:
                    parameter[:, 0] *= 1e-6

    config = peft.DeloraConfig(r=3, target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config, prepare=shrink)
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas)


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.DeloraConfig(r=4, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("delora_A"), "delora_A is missing"),
        (without("delora_w_norm"), "delora_w_norm is missing"),
        (cast(torch.int32, "delora_lambda"), "not as real numbers"),
        (reshaped("delora_A", 3, 16), "the config says r = 4"),
        (reshaped("delora_B", 16, 3), "do not fit"),
        (reshaped("delora_w_norm", 15), "do not fit"),
        (reshaped("delora_lambda", 4), "do not fit"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter), reason)


def test_a_tensor_that_is_not_known_is_refused(oracle):
    assert_an_unknown_tensor_is_refused(oracle.adapter)


@pytest.mark.parametrize(("config", "message"), [({"r": 0}, "r = 0"), ({"peft_type": "HRA"}, "those of DeLoRA")])
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter)
