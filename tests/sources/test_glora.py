"""GLoRA against PEFT's own merge, with every kind of path."""

from __future__ import annotations

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
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

CASES = {
    "lora": ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "vector": ("opt", {"r": 2, "config_A_B": "vector", "config_C": "vector", "target_modules": ["q_proj", "fc2"]}),
    "constant": ("bert", {"r": 2, "config_A_B": "constant", "config_D_E": "vector", "target_modules": ["query"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.GloraConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "glora"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only
    assert all("bias" in reason for reason in source.coverage.skipped.values())
    assert len(source.coverage.skipped) >= 3 * len(source)


def test_no_path_is_no_change(tmp_path):
    config = peft.GloraConfig(r=2, config_A_B="none", target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "opt", config)
    assert not oracle.deltas
    found = list(spectra.decompose(spectra.open_source(oracle.adapter, oracle.base)))
    assert [spectrum.status for spectrum in found] == ["unchanged", "unchanged"]


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.GloraConfig(r=4, target_modules=["q_proj"]))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("glora_A.Xd"), "glora_A.Xd is missing"),
        (without("glora_B.Xu"), "glora_B.Xu is missing"),
        (cast(torch.int32, "glora_A.Xu"), "not as real numbers"),
        (reshaped("glora_A.Xd", 16, 3), "do not fit r = 4"),
        (reshaped("glora_B.Xu", 16, 4), "do not fit r = 4"),
        (lambda t: t | {"glora_A.X": torch.ones(1)}, "not what config_A_B = 'lora' has"),
        (lambda t: t | {"glora_C.gate": torch.ones(1)}, "glora_C.gate [1] of"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


@pytest.mark.parametrize("path", ["vector", "none", "nothing", ["lora"]])
def test_a_path_that_contradicts_the_tensors(oracle, path):
    damaged(oracle.adapter, config={"config_A_B": path})
    assert len(spectra.open_source(oracle.adapter, oracle.base).coverage.unsupported) == 2


def test_a_tensor_that_is_not_known_is_refused(oracle):
    assert_an_unknown_tensor_is_refused(oracle.adapter, oracle.base)


@pytest.mark.parametrize(("config", "message"), [({"r": 0}, "r = 0"), ({"peft_type": "LORA"}, "those of GLoRA")])
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)
