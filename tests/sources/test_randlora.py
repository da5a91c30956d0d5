"""RandLoRA against PEFT's own merge."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_adapter, write_checkpoint
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import BaseRequiredError, SourceError, UnsupportedFormatError

CASES = {
    "wide and tall": ("llama", {"r": 5, "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]}),
    "sparse": ("llama", {"r": 4, "randlora_alpha": 7, "sparse": True, "target_modules": ["q_proj", "k_proj"]}),
    "conv1d": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "bert, very sparse": ("bert", {"r": 4, "very_sparse": True, "target_modules": ["query", "dense"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    # The bases are drawn in bfloat16; the harness widens what it saves, so that PEFT multiplies in float64.
    oracle = make_oracle(tmp_path, kind, peft.RandLoraConfig(**options), prepare=torch.nn.Module.double)
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == "randlora"
    assert_matches(source, oracle.deltas)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only
    delta = source.deltas[0]
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())


def narrow(model):
    for bases in (model.base_model.randlora_A, model.base_model.randlora_B):
        bases["default"] = bases["default"].bfloat16()


def test_bases_of_bfloat16_and_their_copies(tmp_path):
    # PEFT merges such bases in float32.
    config = peft.RandLoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    oracle = make_oracle(tmp_path, "llama", config, prepare=narrow)
    stored = load_file(oracle.adapter / "adapter_model.safetensors")
    assert stored["base_model.randlora_A"].dtype == torch.bfloat16
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, oracle.deltas, 1e-6)
    copies = {name for name in stored if ".randlora_A" in name or ".randlora_B" in name} - {
        "base_model.randlora_A",
        "base_model.randlora_B",
    }
    assert copies
    assert len(source.coverage.skipped) == len(copies)


def test_unsaved_bases_are_refused_by_name_and_the_base_is_needed(tmp_path):
    config = peft.RandLoraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    unsaved = make_oracle(tmp_path / "unsaved", "llama", config)
    with pytest.raises(UnsupportedFormatError, match="save it again with save_projection=true"):
        spectra.open_source(unsaved.adapter, unsaved.base)
    write_adapter(tmp_path / "saved", factors(0), CONFIG)
    with pytest.raises(BaseRequiredError, match="shapes of the weights"):
        spectra.open_source(tmp_path / "saved")


CONFIG = {"peft_type": "RANDLORA", "r": 2, "randlora_alpha": 8}
WEIGHT = "model.layers.{}.self_attn.q_proj.weight"


def factors(layer, lam=(2, 3), gamma=(3, 5), A=(2, 1, 5), B=(6, 3, 2)):
    module = f"base_model.model.{WEIGHT.format(layer).removesuffix('.weight')}"
    shared = {"base_model.randlora_A": torch.randn(A), "base_model.randlora_B": torch.randn(B)}
    return shared | {f"{module}.randlora_lambda": torch.randn(lam), f"{module}.randlora_gamma": torch.randn(gamma)}


def opened(tmp_path, tensors, config=CONFIG):
    write_adapter(tmp_path / "adapter", tensors, config)
    weights = {WEIGHT.format(layer): torch.randn(6, 5) for layer in (0, 1)}
    return spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", weights))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({k: v for k, v in factors(0).items() if "gamma" not in k}, "randlora_gamma is missing"),
        ({k: v.int() if "lambda" in k else v for k, v in factors(0).items()}, "not as real numbers"),
        (factors(0, lam=(3, 2)), "are not [2, 3] and [3, 5]"),
        (factors(0, gamma=(3, 6)), "are not [2, 3] and [3, 5]"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(tmp_path, tensors, reason):
    source = opened(tmp_path, factors(1) | tensors)
    assert reason in source.coverage.unsupported[WEIGHT.format(0)]
    assert source[WEIGHT.format(1)].read().shape == (6, 5)


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        (factors(0), CONFIG | {"r": 3}, "as r in the config"),
        (factors(0, A=(2, 1, 4)), CONFIG, "randlora_A [2, 1, 4]"),
        (factors(0, B=(5, 3, 2)), CONFIG, "randlora_B [5, 3, 2]"),
        (factors(0, B=(6, 2, 2)), CONFIG, "randlora_B [6, 2, 2]"),
    ],
)
def test_bases_that_do_not_fit_are_refused(tmp_path, tensors, config, reason):
    assert reason in opened(tmp_path, tensors, config).coverage.unsupported[WEIGHT.format(0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"randlora_alpha": float("nan")}, "randlora_alpha = nan"),
        ({"peft_type": "VERA"}, "says peft_type 'VERA', the tensors"),
    ],
)
def test_an_unusable_config_is_named(tmp_path, change, message):
    with pytest.raises(SourceError, match=message):
        opened(tmp_path, factors(0), CONFIG | change)
