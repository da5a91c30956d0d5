"""(IA)³ against PEFT's own merge."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.checkpoints import write_adapter, write_checkpoint
from support.peft_oracle import Convolutions, assert_matches, make_oracle
from torch import nn

import spectra
from spectra.errors import BaseRequiredError, SourceError

CASES = {
    "llama": (
        "llama",
        {"target_modules": ["k_proj", "q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "conv1d": (
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "convolutions": (
        Convolutions,
        {"target_modules": ["two", "point", "grouped", "linear"], "feedforward_modules": ["point", "linear"]},
    ),
    "feed-forward convolutions": (
        Convolutions,
        {"target_modules": ["two", "point", "grouped"], "feedforward_modules": "two|grouped"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    model = kind if isinstance(kind, str) else kind()
    oracle = make_oracle(tmp_path, model, peft.IA3Config(**options))
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == "ia3"
    assert_matches(source, oracle.deltas)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only


def test_a_bias_that_is_multiplied_as_well_is_listed(tmp_path):
    config = peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"])
    oracle = make_oracle(tmp_path, "bert", config)
    skipped = spectra.open_source(oracle.adapter, oracle.base).coverage.skipped
    assert "multiplies as well" in skipped["bert.encoder.layer.0.attention.self.query.bias"]
    assert "bert.encoder.layer.0.output.dense.bias" not in skipped


def test_a_fused_projection_comes_in_parts_with_their_own_norms(tmp_path):
    config = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    oracle = make_oracle(tmp_path, "gpt2", config)
    whole = spectra.open_source(oracle.adapter, oracle.base, split=False)
    parts = spectra.open_source(oracle.adapter, oracle.base)
    for name, delta in oracle.deltas.items():
        forms = [parts[f"{name}[{part}]"].read() for part in "qkv"]
        assert torch.allclose(torch.cat([form.to_dense() for form in forms]), delta, rtol=0, atol=1e-12)
        squares = sum(form.base_norm**2 for form in forms)
        assert squares == pytest.approx(whole[name].read().base_norm ** 2)


def test_a_recipe_survives_pickling(tmp_path):
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    oracle = make_oracle(tmp_path, "llama", config)
    delta = spectra.open_source(oracle.adapter, oracle.base).deltas[0]
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())
    with pytest.raises(BaseRequiredError, match="pass base="):
        spectra.open_source(oracle.adapter)


CONFIG = {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}
MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"
WEIGHT = "model.layers.{}.self_attn.q_proj.weight"


def base(tmp_path, *shape):
    return write_checkpoint(tmp_path / "base", {WEIGHT.format(layer): torch.randn(shape) for layer in (0, 1)})


@pytest.mark.parametrize(
    ("vector", "shape", "reason"),
    [
        (torch.randn(5, 1), (6, 5), "neither [6, 1] nor [1, 5]"),
        (torch.randn(6), (6, 5), "neither [6, 1] nor [1, 5]"),
        (torch.ones(6, 1, dtype=torch.int32), (6, 5), "not as real numbers"),
        (torch.randn(1, 4, 1, 1), (6, 5, 3, 3), "does not fit the convolution"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_and_the_others_are_done(tmp_path, vector, shape, reason):
    good = torch.randn((6, 1) if len(shape) == 2 else (1, 6, 1, 1))
    tensors = {f"{MODULE.format(0)}.ia3_l": vector, f"{MODULE.format(1)}.ia3_l": good}
    write_adapter(tmp_path / "adapter", tensors, CONFIG)
    source = spectra.open_source(tmp_path / "adapter", base(tmp_path, *shape))
    assert reason in source.coverage.unsupported[WEIGHT.format(0)]
    assert source[WEIGHT.format(1)].read().shape[0] == 6


def test_a_module_that_the_base_lacks_and_a_base_of_codes(tmp_path):
    tensors = {f"{MODULE.format(layer)}.ia3_l": torch.randn(6, 1) for layer in (0, 1, 2)}
    write_adapter(tmp_path / "adapter", tensors, CONFIG)
    weights = {WEIGHT.format(0): torch.randn(6, 5), WEIGHT.format(1): torch.ones(6, 5, dtype=torch.int8)}
    source = spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", weights))
    assert WEIGHT.format(2) in source.coverage.tuned_only
    assert "I8" in source.coverage.unsupported[WEIGHT.format(1)]
    assert [delta.status for delta in source].count("ok") == 1
    assert len(source) == 3


@pytest.mark.parametrize("pattern", ["(", "(?:x|x)*[yz]"])
def test_an_unusable_pattern_is_named(tmp_path, pattern):
    write_adapter(
        tmp_path / "adapter",
        {"base_model.model." + "x" * 60 + ".ia3_l": torch.randn(1, 6, 1, 1)},
        CONFIG | {"feedforward_modules": pattern},
    )
    model = nn.Module()
    model.add_module("x" * 60, nn.Conv2d(6, 6, 3))
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim > 1}
    with pytest.raises(SourceError, match="not a usable pattern"):
        spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", weights))


def test_another_declared_type_is_an_error(tmp_path):
    write_adapter(tmp_path / "adapter", {f"{MODULE.format(0)}.ia3_l": torch.randn(6, 1)}, {"peft_type": "LORA"})
    with pytest.raises(SourceError, match="says peft_type 'LORA', the tensors"):
        spectra.open_source(tmp_path / "adapter", base(tmp_path, 6, 5))
