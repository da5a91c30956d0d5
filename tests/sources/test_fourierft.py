"""FourierFT against PEFT's own merge, and its factors against the transform."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.adapters import assert_an_unknown_tensor_is_refused
from support.checkpoints import write_adapter, write_checkpoint
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.deltas.forms import Dense, LowRank
from spectra.errors import BaseRequiredError, SourceError

# PEFT transforms in float32 whatever the model's dtype.
TOLERANCE = 1e-6
CASES = {
    "few": ("llama", {"n_frequency": 3, "scaling": 150.0, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "many": ("llama", {"n_frequency": 100, "scaling": 7.5, "random_loc_seed": 3, "target_modules": ["v_proj"]}),
    "conv1d": ("gpt2", {"n_frequency": 5, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "patterns": (
        "bert",
        {"n_frequency": 4, "target_modules": ["query", "value"], "n_frequency_pattern": {"value": 2}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.FourierFTConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == "fourierft"
    assert_matches(source, oracle.deltas, TOLERANCE)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only


@pytest.mark.parametrize("shape", [(12, 9), (7, 20)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_factors_are_the_transform_in_float64(tmp_path, shape, count):
    coefficients = torch.randn(count, dtype=torch.float64)
    source = opened(tmp_path, coefficients, CONFIG | {"n_frequency": count}, shape)
    (delta,) = source
    form = delta.read()
    assert isinstance(form, LowRank)
    assert delta.max_rank == 2 * count == form.left.shape[1]
    positions = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(777))[:count]
    p = torch.arange(shape[0], dtype=torch.float64)[:, None]
    q = torch.arange(shape[1], dtype=torch.float64)[None, :]
    slow = torch.zeros(shape, dtype=torch.float64)
    for c, position in zip(coefficients, positions.tolist(), strict=True):
        u, v = divmod(position, shape[1])
        slow += c * torch.cos(2 * torch.pi * (u * p / shape[0] + v * q / shape[1]))
    assert torch.allclose(form.to_dense(), 2.5 * slow / slow.numel(), rtol=0, atol=1e-13)


def test_many_coefficients_are_a_matrix_and_recipes_survive_pickling(tmp_path):
    (delta,) = opened(tmp_path, torch.randn(10), CONFIG | {"n_frequency": 10}, (12, 9))
    assert isinstance(delta.read(), Dense)
    assert not delta.factored
    assert delta.max_rank == 9
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())


CONFIG = {"peft_type": "FOURIERFT", "n_frequency": 3, "scaling": 2.5, "random_loc_seed": 777}
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def opened(tmp_path, coefficients, config, shape=(12, 9)):
    name = f"base_model.model.{WEIGHT.removesuffix('.weight')}.fourierft_spectrum"
    write_adapter(tmp_path / "adapter", {name: coefficients}, config)
    return spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", {WEIGHT: torch.randn(*shape)}))


@pytest.mark.parametrize(
    ("coefficients", "config", "reason"),
    [
        (torch.randn(4), CONFIG, "n_frequency = 3"),
        (torch.randn(3, 1), CONFIG, "is not a list"),
        (torch.randn(200), CONFIG | {"n_frequency": 200}, "at most 108"),
        (torch.ones(3, dtype=torch.int32), CONFIG, "not as real numbers"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(tmp_path, coefficients, config, reason):
    source = opened(tmp_path, coefficients, config)
    assert reason in source.coverage.unsupported[WEIGHT]
    assert source[WEIGHT].status == "unsupported"


def test_a_tensor_that_is_not_known_is_refused(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.FourierFTConfig(n_frequency=3, target_modules=["q_proj"]))
    assert_an_unknown_tensor_is_refused(oracle.adapter, oracle.base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling": float("nan")}, "scaling = nan"),
        ({"scaling": None}, "scaling = None"),
        ({"random_loc_seed": None}, "random_loc_seed = None"),
        ({"random_loc_seed": 2**70}, "is not a seed"),
        ({"n_frequency_pattern": {"(": 1}}, "not a regular expression"),
        ({"peft_type": "C3A"}, "says peft_type 'C3A', the tensors"),
    ],
)
def test_an_unusable_config_is_named(tmp_path, change, message):
    with pytest.raises(SourceError, match=message):
        opened(tmp_path, torch.randn(3), CONFIG | change)


def test_the_config_and_the_base_are_needed(tmp_path):
    with pytest.raises(SourceError, match="put it back"):
        opened(tmp_path, torch.randn(3), None)
    opened(tmp_path, torch.randn(3), CONFIG)
    with pytest.raises(BaseRequiredError, match="the shapes of the weights, which ΔW needs: pass base="):
        spectra.open_source(tmp_path / "adapter")
