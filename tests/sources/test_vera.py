"""VeRA and PVeRA against PEFT's own merge."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.checkpoints import write_adapter, write_checkpoint
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import BaseRequiredError, SourceError, UnsupportedFormatError

CASES = {
    "vera on llama": ("llama", peft.VeraConfig, {"r": 3, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "vera on conv1d": ("gpt2", peft.VeraConfig, {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "pvera on llama": ("llama", peft.PveraConfig, {"r": 3, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "pvera on bert": ("bert", peft.PveraConfig, {"r": 2, "target_modules": ["query", "dense"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, cls, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, cls(**options), prepare=torch.nn.Module.double)
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == case.split()[0]
    assert_matches(source, oracle.deltas)
    assert {delta.max_rank for delta in source} == {options["r"]}
    assert all(delta.factored for delta in source)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only
    assert all("mean" in delta.note for delta in source) == (source.kind == "pvera")


def test_a_fused_projection_comes_in_parts(tmp_path):
    _, cls, options = CASES["vera on conv1d"]
    oracle = make_oracle(tmp_path, "gpt2", cls(**options | {"target_modules": ["c_attn"]}))
    source = spectra.open_source(oracle.adapter, oracle.base)
    for name, delta in oracle.deltas.items():
        for i, part in enumerate("qkv"):
            got = source[f"{name}[{part}]"].read()
            assert torch.allclose(got.to_dense(), delta[16 * i : 16 * i + 16], rtol=0, atol=1e-7)
            assert got.base_norm > 0


def test_a_recipe_survives_pickling(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.VeraConfig(r=2, target_modules=["q_proj"]))
    delta = spectra.open_source(oracle.adapter, oracle.base).deltas[0]
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())


@pytest.mark.parametrize("cls", [peft.VeraConfig, peft.PveraConfig])
def test_unsaved_projections_are_refused_by_name(tmp_path, cls):
    oracle = make_oracle(tmp_path, "llama", cls(r=2, target_modules=["q_proj"], save_projection=False))
    with pytest.raises(UnsupportedFormatError, match="save it again with save_projection=true"):
        spectra.open_source(oracle.adapter, oracle.base)


def test_the_base_is_needed(tmp_path):
    write_adapter(tmp_path, factors(), CONFIG)
    with pytest.raises(BaseRequiredError, match="shapes of the weights"):
        spectra.open_source(tmp_path)


CONFIG = {"peft_type": "VERA", "r": 2}
MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"
WEIGHT = "model.layers.{}.self_attn.q_proj.weight"
SHARED = {"base_model.vera_A": (2, 5), "base_model.vera_B": (6, 2)}


def factors(layer=0, out=6):
    shared = {name: torch.randn(shape) for name, shape in SHARED.items()}
    module = MODULE.format(layer)
    return shared | {f"{module}.vera_lambda_b": torch.randn(out), f"{module}.vera_lambda_d": torch.randn(2)}


def base(tmp_path):
    return write_checkpoint(tmp_path / "base", {WEIGHT.format(layer): torch.randn(6, 5) for layer in (0, 1)})


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (lambda t: {k: v for k, v in t.items() if "lambda_d" not in k}, "vera_lambda_d is missing"),
        (lambda t: t | {f"{MODULE.format(0)}.vera_lambda_d": torch.randn(3)}, "does not fit the projection"),
        (lambda t: {k: v.int() if "lambda" in k else v for k, v in t.items()}, "not as real numbers"),
        (lambda t: factors(out=4), "the base weight 6 rows"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(tmp_path, mutate, reason):
    write_adapter(tmp_path / "adapter", factors(1) | mutate(factors()), CONFIG)
    source = spectra.open_source(tmp_path / "adapter", base(tmp_path))
    assert reason in source.coverage.unsupported[WEIGHT.format(0)]
    assert source[WEIGHT.format(1)].read().shape == (6, 5)


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        (factors(), CONFIG | {"r": 3}, "the config says r = 3"),
        (factors() | {"base_model.vera_A": torch.randn(2, 4)}, CONFIG, "too small"),
        (factors() | {"base_model.vera_B": torch.randn(5, 2)}, CONFIG, "too small"),
    ],
)
def test_projections_that_do_not_fit_are_refused(tmp_path, tensors, config, reason):
    write_adapter(tmp_path / "adapter", tensors, config)
    source = spectra.open_source(tmp_path / "adapter", base(tmp_path))
    assert reason in source.coverage.unsupported[WEIGHT.format(0)]


def test_copies_of_the_projections_and_a_config_that_denies_them_are_said(tmp_path):
    copy = {f"{MODULE.format(0)}.vera_A": torch.randn(2, 5)}
    write_adapter(tmp_path / "adapter", factors() | copy, CONFIG | {"save_projection": False})
    source = spectra.open_source(tmp_path / "adapter", base(tmp_path))
    assert "a copy" in source.coverage.skipped["model.layers.0.self_attn.q_proj.vera_A"]
    assert any("yet they are there" in warning for warning in source.coverage.warnings)
    assert len(source) == 1


def test_another_declared_type_is_an_error(tmp_path):
    write_adapter(tmp_path / "adapter", factors(), CONFIG | {"peft_type": "PVERA"})
    with pytest.raises(SourceError, match="says peft_type 'PVERA', the tensors"):
        spectra.open_source(tmp_path / "adapter", base(tmp_path))
