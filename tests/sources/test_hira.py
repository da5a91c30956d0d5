"""HiRA against PEFT's own merge: linear layers, Conv1D, convolutions and embeddings."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.adapters import (
    assert_an_unknown_tensor_is_refused,
    assert_needs_the_base,
    assert_one_is_refused,
    assert_recipes_keep_their_laws,
    cast,
    damaged,
    reshaped,
    without,
)
from support.peft_oracle import Convolutions, assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

CASES = {
    "llama": ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "pattern": ("bert", {"r": 4, "rank_pattern": {"layer.0.attention.self.query": 2}, "target_modules": ["query"]}),
    "conv1d": ("gpt2", {"r": 2, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]}),
    "embedding": ("llama", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "convolutions": (Convolutions, {"r": 2, "target_modules": ["two", "one", "point", "linear"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind if isinstance(kind, str) else kind(), peft.HiraConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == "hira"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, None)
    assert not source.coverage.unsupported


def test_a_fused_projection_comes_in_parts(tmp_path):
    config = peft.HiraConfig(r=2, fan_in_fan_out=True, target_modules=["c_attn"])
    oracle = make_oracle(tmp_path, "gpt2", config)
    parts = {
        f"{name}[{part}]": delta[i * 16 : (i + 1) * 16]
        for name, delta in oracle.deltas.items()
        for i, part in enumerate("qkv")
    }
    assert_matches(spectra.open_source(oracle.adapter, oracle.base), parts)


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.HiraConfig(r=4, target_modules=["q_proj"]))


def test_its_laws_and_its_base(oracle):
    assert_recipes_keep_their_laws(spectra.open_source(oracle.adapter, oracle.base), oracle.base)
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("hira_A"), "hira_A is missing"),
        (lambda t: t | {"hira_embedding_A": torch.ones(4, 16)}, "hira_embedding_B is missing"),
        (
            lambda t: t | {"hira_embedding_A": torch.ones(4, 16), "hira_embedding_B": torch.ones(16, 4)},
            "of model.layers.0.self_attn.q_proj is no part of HiRA",
        ),
        (cast(torch.uint8, "hira_B"), "not as real numbers"),
        (reshaped("hira_A", 16), "are no matrices"),
        (reshaped("hira_A", 16, 4), "cannot be multiplied"),
        (reshaped("hira_A", 4, 15), "do not fit the base weight"),
        (lambda t: {n: x[:3] if "_A" in n else x[:, :3] for n, x in t.items()}, "the config says r = 4"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


def test_a_tensor_that_is_not_known_is_refused(oracle):
    assert_an_unknown_tensor_is_refused(oracle.adapter, oracle.base)


@pytest.mark.parametrize(("config", "message"), [({"r": "4"}, "r = '4'"), ({"peft_type": "LORA"}, "those of HiRA")])
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)


def test_a_part_is_the_same_recipe_in_every_process(tmp_path):
    """A stored result is found again by its recipe's text, so no address in memory may be in it."""
    config = peft.HiraConfig(r=2, fan_in_fan_out=True, target_modules=["c_attn"])
    oracle = make_oracle(tmp_path, "gpt2", config)
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        assert pickle.loads(pickle.dumps(delta)) == delta
        assert " at 0x" not in repr(delta.recipe)
