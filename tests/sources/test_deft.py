"""DEFT and PaRa against PEFT's own merge, in float32 as PEFT computes it, and against the definition in float64."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
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

FLOAT32 = 2e-6  # PEFT forms the projection in float32 whatever the weights' type: a few 2⁻²⁴ per product
CASES = {
    "relu": ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "qr": ("llama", {"r": 3, "decomposition_method": "qr", "target_modules": ["q_proj", "down_proj"]}),
    "scaled": ("bert", {"r": 4, "alpha": 6, "decomposition_method": "qr", "target_modules": ["query"]}),
    "removal alone": ("llama", {"r": 4, "para": True, "decomposition_method": "qr", "target_modules": ["q_proj"]}),
    "removal alone, relu": ("llama", {"r": 4, "para": True, "target_modules": ["q_proj"]}),
    "more than the outputs": ("llama", {"r": 12, "alpha": 3, "target_modules": ["v_proj"]}),
    "conv1d": ("gpt2", {"r": 2, "fan_in_fan_out": True, "target_modules": ["c_fc", "c_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.DeftConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "deft"
    assert oracle.deltas
    assert_matches(source, oracle.deltas, FLOAT32)
    assert_recipes_keep_their_laws(source, None if kind == "gpt2" else oracle.base)
    assert not source.coverage.unsupported
    assert all(delta.factored and delta.max_rank == min(options["r"], *delta.shape) for delta in source)


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_the_definition_in_float64(tmp_path, method):
    config = peft.DeftConfig(r=3, alpha=6, decomposition_method=method, target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config)
    base, stored = load_file(oracle.base / "model.safetensors"), load_file(oracle.adapter / "adapter_model.safetensors")
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        module = f"base_model.model.{delta.name.removesuffix('.weight')}"
        P, R, W = stored[f"{module}.deft_P"], stored[f"{module}.deft_R"], base[delta.name]
        if method == "relu":
            Q, V = P, torch.where(P > 0, P, 0)
        else:
            # Householder's Q is Gram–Schmidt's up to signs: those that make the triangle's diagonal negative …
            Q = torch.zeros_like(P)
            for i in range(3):
                rest = P[:, i] - sum(((Q[:, j] @ P[:, i]) * Q[:, j] for j in range(i)), torch.zeros(16).double())
                Q[:, i] = rest / rest.norm()
            Q = Q * torch.sign((Q * torch.linalg.qr(P.float()).Q).sum(0))  # … or as PEFT's float32 has them
            V = Q
        merged = (torch.eye(16).double() - Q @ V.T) @ W + Q @ (2 * R)
        assert torch.allclose(delta.read().to_dense(), merged - W, rtol=0, atol=1e-13)


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.DeftConfig(r=4, target_modules=["q_proj"]))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("deft_P"), "deft_P is missing"),
        (without("deft_R"), "deft_R is missing"),
        (cast(torch.int32, "deft_P"), "not as real numbers"),
        (reshaped("deft_P", 4, 16), "do not fit r = 4"),
        (reshaped("deft_R", 3, 16), "do not fit r = 4"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


def test_an_injection_that_the_config_denies(oracle):
    damaged(oracle.adapter, config={"para": True})
    assert len(spectra.open_source(oracle.adapter, oracle.base).coverage.unsupported) == 2


def test_a_tensor_that_is_not_known_is_refused(oracle):
    assert_an_unknown_tensor_is_refused(oracle.adapter, oracle.base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"decomposition_method": "svd"}, "decomposition_method = 'svd'"),
        ({"alpha": float("inf")}, "alpha = inf"),
        ({"r": 0}, "r = 0"),
        ({"para": None}, "para = None"),
        ({"peft_type": "OSF"}, "those of DEFT"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)
