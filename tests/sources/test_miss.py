"""MiSS in its three variants against PEFT's own merge; Bone, which PEFT no longer has, against its definition."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import (
    assert_needs_the_base,
    assert_one_is_refused,
    assert_recipes_keep_their_laws,
    cast,
    damaged,
    reshaped,
)
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

CASES = {
    "plain": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "a last copy cut off": ("llama", {"r": 5, "target_modules": ["q_proj", "down_proj"]}),
    "random start": ("bert", {"r": 4, "init_weights": False, "target_modules": ["query"]}),
    "wider than high": ("bert", {"r": 12, "target_modules": ["1.output.dense", "query"]}),
    "mini": ("llama", {"r": 4, "mini_r": 2, "init_weights": "mini", "target_modules": ["q_proj", "v_proj"]}),
    "mini, cut off": (
        "llama",
        {"r": 3, "mini_r": 8, "init_weights": "mini", "target_modules": ["q_proj", "down_proj"]},
    ),
    "bat": ("llama", {"r": 4, "init_weights": "bat", "target_modules": ["q_proj", "v_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.MissConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "miss"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert {delta.factored for delta in source} == {options.get("init_weights") != "bat"}


@pytest.mark.parametrize(("r", "mini_r", "rank"), [(4, 2, 2), (2, 4, 2)])
def test_mini_has_the_rank_of_its_smaller_side(tmp_path, r, mini_r, rank):
    config = peft.MissConfig(r=r, mini_r=mini_r, init_weights="mini", target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config)
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        assert delta.max_rank == rank
        assert delta.read().left.shape == (16, rank)


@pytest.mark.parametrize("variant", [True, "bat"])
def test_bone_entry_by_entry(tmp_path, variant):
    r = 4
    oracle = make_oracle(tmp_path, "llama", peft.MissConfig(r=r, init_weights=variant, target_modules=["v_proj"]))
    file = oracle.adapter / "adapter_model.safetensors"
    save_file({name.replace("miss_block", "bone_block"): t for name, t in load_file(file).items()}, file)
    damaged(oracle.adapter, config={"peft_type": "BONE", "mini_r": None})
    blocks, base = load_file(file), load_file(oracle.base / "model.safetensors")
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        B = blocks[f"base_model.model.{delta.name.removesuffix('.weight')}.bone_block"]
        W, out, inputs = base[delta.name], *delta.shape
        expected = torch.zeros(out, inputs, dtype=torch.float64)
        for i in range(out):
            for j in range(inputs):
                if variant == "bat":
                    g, start = i // r, j - j % r
                    mixed = sum(W[i, start + k] * B[g, k, j % r] for k in range(r))
                    expected[i, j] = mixed + B[g, i % r, j % r]
                else:
                    expected[i, j] = B[j % r, i]
        assert torch.allclose(delta.read().to_dense(), expected, rtol=0, atol=1e-14)


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.MissConfig(r=4, target_modules=["q_proj"]))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cast(torch.int8, "miss_block"), "not as real numbers"),
        (reshaped("miss_block", 16, 4), "is not what r = 4"),
        (reshaped("miss_block", 3, 16), "is not what r = 4"),
        (reshaped("miss_block", 4, 4, 4), "is not what r = 4"),
        (lambda t: t | {"bone_block": t["miss_block"].clone()}, "both a miss_block and a bone_block"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_weights": "bath"}, "init_weights = 'bath'"),
        ({"init_weights": None}, "init_weights = None"),
        ({"r": -1}, "r = -1"),
        ({"init_weights": "mini", "mini_r": 0}, "mini_r = 0"),
        ({"peft_type": "HRA"}, "those of MiSS, Bone"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)


def test_a_variant_that_contradicts_the_tensors(oracle):
    damaged(oracle.adapter, config={"init_weights": "bat"})
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert len(source.coverage.unsupported) == 2
