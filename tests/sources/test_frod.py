"""FRoD against PEFT's own merge, which keeps U and λ in float32, and against the definition in float64."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
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

FLOAT32 = 2e-6  # U is rounded to float32, and the whole weight is made of it
CASES = {
    "llama": ("llama", {"sparse_rate": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "bert": ("bert", {"sparse_rate": 0.05, "target_modules": ["query", "attention.output.dense", "1.output.dense"]}),
    "conv1d": ("gpt2", {"sparse_rate": 0.1, "fan_in_fan_out": True, "target_modules": ["c_fc"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.FrodConfig(**options, progressbar=False))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "frod"
    assert oracle.deltas
    assert_matches(source, oracle.deltas, FLOAT32)
    assert_recipes_keep_their_laws(source, None if kind == "gpt2" else oracle.base)
    assert not source.coverage.unsupported
    assert not source.coverage.skipped
    assert not source.coverage.tuned_only


@pytest.fixture
def oracle(tmp_path):
    config = peft.FrodConfig(sparse_rate=0.1, progressbar=False, target_modules=["q_proj"])
    return make_oracle(tmp_path, "llama", config)


def test_the_definition_in_float64(oracle):
    base, stored = load_file(oracle.base / "model.safetensors"), load_file(oracle.adapter / "adapter_model.safetensors")
    V = stored["base_model.frod_V.self_attn_q_proj"]
    places = stored["base_model.frod_s_indices.self_attn_q_proj"]
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        module = f"base_model.model.{delta.name.removesuffix('.weight')}"
        W = base[delta.name]
        scaled = W @ torch.linalg.inv(V).T
        U = torch.stack([column / column.norm() for column in scaled.T], 1)
        S = torch.diag(stored[f"{module}.frod_lambda_l"])
        for value, (i, j) in zip(stored[f"{module}.frod_lambda_s_values"], places.T.tolist(), strict=True):
            S[i, j] += value
        expected = U @ S @ V.T - W
        assert torch.allclose(delta.read().to_dense(), expected, rtol=0, atol=1e-12 * float(expected.norm()))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("frod_lambda_s_values"), "frod_lambda_s_values is missing"),
        (cast(torch.int32, "frod_lambda_l"), "not as real numbers"),
        (reshaped("frod_lambda_l", 15), "do not fit 16 inputs"),
        (reshaped("frod_lambda_s_values", 3), "do not place [3]"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


@pytest.mark.parametrize("name", ["frod_V", "frod_s_indices", "frod_s_size"])
def test_without_a_shared_tensor_nothing_is_done(oracle, name):
    file = oracle.adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if name not in n}, file)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert len(source.coverage.unsupported) == 2
    assert all("save_projection" in reason for reason in source.coverage.unsupported.values())


def test_the_basis_of_a_role_without_a_module_is_no_weight(oracle):
    file = oracle.adapter / "adapter_model.safetensors"
    stored = load_file(file)
    others = {n.replace("q_proj", "k_proj"): t.clone() for n, t in stored.items() if n.endswith(".self_attn_q_proj")}
    assert len(others) == 3
    before = spectra.open_source(oracle.adapter, oracle.base)
    save_file(stored | others, file)
    after = spectra.open_source(oracle.adapter, oracle.base)
    assert [delta.name for delta in after] == [delta.name for delta in before]
    assert str(after.coverage) == str(before.coverage)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("frod_V", torch.zeros(16, 16), "cannot be inverted"),
        ("frod_s_size", torch.tensor([15, 16]), "is not 16 × 16"),
        ("frod_s_indices", torch.full((2, 25), 16), "lies outside of 16 × 16"),
    ],
)
def test_shared_tensors_that_cannot_be_used(oracle, name, value, reason):
    file = oracle.adapter / "adapter_model.safetensors"
    save_file({n: value if f".{name}." in n else t for n, t in load_file(file).items()}, file)
    found = list(spectra.decompose(spectra.open_source(oracle.adapter, oracle.base)))
    assert {spectrum.status for spectrum in found} == {"unreadable"}
    assert all(reason in spectrum.reason for spectrum in found)


def test_a_tensor_that_is_not_known_is_refused(oracle):
    assert_an_unknown_tensor_is_refused(oracle.adapter, oracle.base)


def test_a_contradicting_config_is_named(oracle):
    damaged(oracle.adapter, config={"peft_type": "LORA"})
    with pytest.raises(SourceError, match="those of FRoD"):
        spectra.open_source(oracle.adapter, oracle.base)
