"""GraLoRA, hybrid or not, against PEFT's own merge; the width of its factors."""

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
    "two blocks": ("llama", {"r": 4, "gralora_k": 2, "alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "four blocks": ("bert", {"r": 4, "gralora_k": 4, "alpha": 3, "target_modules": ["query", "output.dense"]}),
    "one block": ("llama", {"r": 3, "gralora_k": 1, "alpha": 3, "target_modules": ["q_proj"]}),
    "hybrid": ("llama", {"r": 4, "gralora_k": 2, "hybrid_r": 3, "alpha": 5, "target_modules": ["q_proj", "v_proj"]}),
    "conv1d": ("gpt2", {"r": 2, "gralora_k": 2, "hybrid_r": 1, "fan_in_fan_out": True, "target_modules": ["c_fc"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.GraloraConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "gralora"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, None if kind == "gpt2" else oracle.base)
    assert not source.coverage.unsupported
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas)
    width = options["gralora_k"] * options["r"] + options.get("hybrid_r", 0)
    for delta in source:
        assert delta.factored
        assert delta.read().left.shape == (delta.shape[0], width)
        assert delta.max_rank == min(width, *delta.shape)


@pytest.fixture
def oracle(tmp_path):
    config = peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=2, alpha=4, target_modules=["q_proj"])
    return make_oracle(tmp_path, "llama", config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("gralora_B"), "gralora_B is missing"),
        (without("gralora_A_general.weight"), "gralora_A_general is missing"),
        (cast(torch.int32, "gralora_A"), "not as real numbers"),
        (reshaped("gralora_A", 4, 4, 4), "the config says r = 4 and gralora_k = 2"),
        (reshaped("gralora_B", 2, 3, 8), "the config says r = 4 and gralora_k = 2"),
        (reshaped("gralora_A_general.weight", 3, 16), "the config says hybrid_r = 2"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter), reason)


def test_plain_factors_that_the_config_does_not_know(oracle):
    damaged(oracle.adapter, config={"hybrid_r": 0})
    assert len(spectra.open_source(oracle.adapter).coverage.unsupported) == 2


def test_a_rank_that_the_blocks_cannot_share(tmp_path):
    config = peft.GraloraConfig(r=4, gralora_k=2, target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config)
    odd = {"gralora_A": torch.ones(2, 8, 3), "gralora_B": torch.ones(2, 3, 8)}
    damaged(oracle.adapter, lambda _: odd, {"r": 3})
    reasons = spectra.open_source(oracle.adapter).coverage.unsupported
    assert "is not divisible by gralora_k" in reasons["model.layers.0.self_attn.q_proj.weight"]


def test_a_tensor_that_is_not_known_is_refused(oracle):
    assert_an_unknown_tensor_is_refused(oracle.adapter)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha": float("nan")}, "alpha = nan"),
        ({"gralora_k": 0}, "gralora_k = 0"),
        ({"hybrid_r": -1}, "hybrid_r = -1"),
        ({"peft_type": "LORA"}, "those of GraLoRA"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter)
