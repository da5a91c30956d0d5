"""OSF against PEFT's own merge, which decomposes in float32, and against the definition in float64."""

from __future__ import annotations

import numpy as np
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
    without,
)
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

# PEFT takes the base's SVD in float32; its subspaces are off by 2⁻²⁴·‖W₀‖ over the gap of the singular values.
FLOAT32 = 2e-5
CASES = {
    "a count": ("llama", {"effective_rank": 12, "target_modules": ["q_proj", "down_proj"]}),
    "a share": ("bert", {"effective_rank": 0.75, "target_modules": ["query", "output.dense"]}),
    "half": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "a pattern": ("llama", {"effective_rank": 4, "rank_pattern": {r"layers\.0\.": 14}, "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.OSFConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "osf"
    assert oracle.deltas
    assert_matches(source, oracle.deltas, FLOAT32)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert not source.coverage.unsupported


@pytest.mark.parametrize(("kept", "factored"), [(9, True), (8, False), (2, False)])
def test_it_is_factored_where_that_is_smaller(tmp_path, kept, factored):
    oracle = make_oracle(tmp_path, "llama", peft.OSFConfig(effective_rank=kept, target_modules=["q_proj"]))
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        assert delta.factored is factored
        assert delta.max_rank == min(2 * (16 - kept), 16)


def test_the_definition_in_float64(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.OSFConfig(effective_rank=13, target_modules=["q_proj"]))
    base, stored = load_file(oracle.base / "model.safetensors"), load_file(oracle.adapter / "adapter_model.safetensors")
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        module = f"base_model.model.{delta.name.removesuffix('.weight')}.osf_svd_params"
        U, S, V = (stored[f"{module}.{part}_low"].numpy() for part in "USV")
        W = base[delta.name].numpy()
        left, values, right = np.linalg.svd(W)
        kept = sum(values[i] * np.outer(left[:, i], right[i]) for i in range(13))
        expected = kept + U @ np.diag(S) @ V - W
        assert np.allclose(delta.read().to_dense().numpy(), expected, rtol=0, atol=1e-13)
        assert delta.max_rank == 6


def test_equal_singular_values_leave_the_subspace_open(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.OSFConfig(effective_rank=8, target_modules=["q_proj"]))
    file = oracle.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.eye(16).double()
    save_file(tensors, file)
    found = {s.layer: s for s in spectra.decompose(spectra.open_source(oracle.adapter, oracle.base))}
    assert found[0].status == "unreadable"
    assert "singular values 8 and 9 of the base weight are equal" in found[0].reason
    assert found[1].status == "ok"


@pytest.mark.parametrize("kept", [4, 12])
def test_a_base_without_an_svd_gives_no_number(tmp_path, kept):
    oracle = make_oracle(tmp_path, "llama", peft.OSFConfig(effective_rank=kept, target_modules=["q_proj"]))
    file = oracle.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file)
    found = {s.layer: s.status for s in spectra.decompose(spectra.open_source(oracle.adapter, oracle.base))}
    assert found == {0: "nonfinite", 1: "ok"}


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.OSFConfig(effective_rank=10, target_modules=["q_proj"]))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("osf_svd_params.S_low"), "S_low is missing"),
        (cast(torch.int32, "osf_svd_params.U_low"), "not as real numbers"),
        (reshaped("osf_svd_params.S_low", 5), "effective_rank = 10 leaves 6"),
        (reshaped("osf_svd_params.V_low", 16, 6), "effective_rank = 10 leaves 6"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"effective_rank": float("nan")}, "effective_rank = nan"),
        ({"effective_rank": "all"}, "effective_rank = 'all'"),
        ({"rank_pattern": {"(": 3}}, "is unusable"),
        ({"rank_pattern": [3]}, "not an object"),
        ({"peft_type": "LORA"}, "those of OSF"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)
