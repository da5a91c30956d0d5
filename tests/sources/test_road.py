"""RoAd in its three variants against PEFT's own merge."""

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


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize(
    ("kind", "group", "targets"),
    [("llama", 8, ["q_proj", "v_proj", "up_proj"]), ("opt", 4, ["q_proj", "fc2"]), ("bert", 2, ["query"])],
)
def test_equals_pefts_merge_minus_base(kind, group, targets, variant, tmp_path):
    config = peft.RoadConfig(variant=variant, group_size=group, target_modules=targets)
    oracle = make_oracle(tmp_path, kind, config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "road"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert not source.coverage.unsupported
    assert any("biases" in warning for warning in source.coverage.warnings)


@pytest.fixture
def oracle(tmp_path):
    config = peft.RoadConfig(variant="road_2", group_size=8, target_modules=["q_proj"])
    return make_oracle(tmp_path, "llama", config)


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("road_alpha"), "road_alpha is missing"),
        (cast(torch.int32, "road_theta"), "not as real numbers"),
        (reshaped("road_theta", 8), "are not the 16"),
        (reshaped("road_alpha", 16, 1), "are not the 16"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


@pytest.mark.parametrize("variant", ["road_1", "road_4"])
def test_a_variant_that_contradicts_the_tensors(oracle, variant):
    damaged(oracle.adapter, config={"variant": variant})
    assert len(spectra.open_source(oracle.adapter, oracle.base).coverage.unsupported) == 2


@pytest.mark.parametrize("size", [5, 32])
def test_a_group_that_does_not_divide_the_outputs(oracle, size):
    damaged(oracle.adapter, config={"group_size": size})
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert all(f"group_size = {size}" in reason for reason in source.coverage.unsupported.values())
    assert len(source.coverage.unsupported) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "road_3"}, "variant = 'road_3'"),
        ({"variant": ["road_1"]}, r"variant = \['road_1'\]"),
        ({"group_size": 0}, "group_size = 0"),
        ({"peft_type": "OFT"}, "those of RoAd"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)
