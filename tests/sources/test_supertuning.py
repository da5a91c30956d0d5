"""Super-Tuning and Supra against PEFT's own merge."""

from __future__ import annotations

import peft
import pytest
import torch
from support.adapters import (
    assert_needs_the_base,
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
    "sparse": ("llama", {"sparsity": 0.9, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "very sparse": ("bert", {"sparsity": 0.99, "select_top": False, "target_modules": ["query"]}),
    "with a LoRA": ("llama", {"sparsity": 0.9, "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.SupertuningConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "supertuning"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert not source.coverage.unsupported
    assert not source.coverage.skipped


def test_few_entries_are_few_ranks(tmp_path):
    config = peft.SupertuningConfig(sparsity=0.99, target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config)
    assert {delta.max_rank for delta in spectra.open_source(oracle.adapter, oracle.base)} == {2}


@pytest.fixture
def oracle(tmp_path):
    config = peft.SupertuningConfig(sparsity=0.9, r=2, target_modules=["q_proj"])
    return make_oracle(tmp_path, "llama", config)


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


def test_a_place_that_comes_twice_is_added_twice(oracle):
    twice = {
        "supertuning_indices": torch.tensor([17, 17, 3]).int(),
        "supertuning_values": torch.tensor([1.0, 2.0, 5.0]),
    }
    damaged(oracle.adapter, lambda _: twice, {"r": None})
    delta = spectra.open_source(oracle.adapter, oracle.base)["model.layers.0.self_attn.q_proj.weight"]
    matrix = delta.read().to_dense()
    assert {(i, j): float(matrix[i, j]) for i, j in matrix.nonzero().tolist()} == {(1, 1): 3.0, (0, 3): 5.0}


@pytest.mark.parametrize("place", [-1, 256])
def test_a_place_outside_of_the_weight(oracle, place):
    def move(tensors):
        tensors["supertuning_indices"][3] = place
        return tensors

    damaged(oracle.adapter, move)
    found = {s.layer: s for s in spectra.decompose(spectra.open_source(oracle.adapter, oracle.base))}
    assert found[0].status == "unreadable"
    assert "lies outside of 16 × 16" in found[0].reason
    assert found[1].status == "ok"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("supertuning_values"), "supertuning_values is missing"),
        (without("supertuning_indices"), "supertuning_indices of"),
        (without("supertuning_lora_A.weight"), "supertuning_lora_A is missing"),
        (cast(torch.float32, "supertuning_indices"), "are [25] of F32"),
        (cast(torch.int32, "supertuning_values"), "not as real numbers"),
        (reshaped("supertuning_values", 24), "for values [24]"),
        (reshaped("supertuning_lora_B.weight", 16, 3), "do not fit r = 2"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


def test_positions_that_were_not_saved(tmp_path):
    config = peft.SupertuningConfig(sparsity=0.9, save_precomputed_indices=False, target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config)
    reasons = spectra.open_source(oracle.adapter, oracle.base).coverage.unsupported
    assert len(reasons) == 2
    assert all("were not saved" in reason for reason in reasons.values())


def test_factors_that_the_config_denies(oracle):
    damaged(oracle.adapter, config={"r": None})
    assert len(spectra.open_source(oracle.adapter, oracle.base).coverage.unsupported) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"peft_type": "SHIRA"}, "those of Super"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)
