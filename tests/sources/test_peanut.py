"""PEANuT against PEFT's own merge, with every activation that is supported."""

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
from spectra.sources.formats.peanut import ACTIVATIONS

CASES = {
    "flat": ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "deep": ("bert", {"r": 4, "depth": 2, "scaling": 0.7, "target_modules": ["query", "output.dense"]}),
    **{
        f"{name}": ("llama", {"r": 3, "depth": 3, "act_fn": name, "target_modules": ["q_proj"]}) for name in ACTIVATIONS
    },
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.PeanutConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "peanut"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only
    assert all(delta.factored and delta.max_rank == options["r"] for delta in source)


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.PeanutConfig(r=4, depth=1, target_modules=["q_proj"]))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("peanut_A.weight"), "peanut_A is missing"),
        (without("peanut_decoders.0.weight"), "peanut_decoders.0 is missing"),
        (cast(torch.int32, "peanut_B.weight"), "not as real numbers"),
        (reshaped("peanut_A.weight", 16, 4), "does not fit r = 4"),
        (reshaped("peanut_encoders.0.weight", 3, 3), "does not fit r = 4"),
        (lambda t: t | {"peanut_encoders.1.weight": torch.ones(4, 4)}, "the config says depth = 1"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


@pytest.mark.parametrize("depth", [0, 2**40])
def test_a_depth_that_contradicts_the_tensors(oracle, depth):
    damaged(oracle.adapter, config={"depth": depth})
    assert len(spectra.open_source(oracle.adapter, oracle.base).coverage.unsupported) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"act_fn": "mish"}, "act_fn = 'mish'"),
        ({"act_fn": ["relu"]}, "act_fn ="),
        ({"depth": 1.5}, "depth = 1.5"),
        ({"scaling": float("nan")}, "scaling = nan"),
        ({"peft_type": "LORA"}, "those of PEANuT"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)
