"""AdaLoRA against PEFT's own merge."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.adapters import assert_an_unknown_tensor_is_refused
from support.checkpoints import write_adapter
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

CASES = {
    "llama": ("llama", {"init_r": 4, "target_r": 2, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}),
    "conv1d": ("gpt2", {"init_r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "no alpha": ("bert", {"init_r": 3, "lora_alpha": 0, "target_modules": ["query"]}),
}


def restore_divisor(model):
    """PEFT marks its divisor as trainable, yet never saves it: the harness must not move it."""
    config = model.peft_config["default"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ranknum" in name:
                parameter.fill_(config.init_r)


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.AdaLoraConfig(total_step=10, **options), prepare=restore_divisor)
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == "adalora"
    assert_matches(source, oracle.deltas)
    assert all(delta.factored for delta in source)
    assert not source.coverage.unsupported
    assert {d.max_rank for d in spectra.open_source(oracle.adapter)} == {options["init_r"]}


def test_pruned_ranks_keep_the_divisor_of_the_first(tmp_path):
    kept = {"model.layers.0.self_attn.q_proj": [True, False, True, False],
            "model.layers.1.self_attn.q_proj": [False, False, False, False]}  # fmt: skip
    config = peft.AdaLoraConfig(init_r=4, total_step=10, lora_alpha=3, target_modules=["q_proj"])

    def prune(model):
        restore_divisor(model)
        with torch.no_grad():
            for module, mask in kept.items():
                layer = model.get_submodule(f"base_model.model.{module}")
                layer.lora_E["default"][~torch.tensor(mask)] = 0
        config.rank_pattern = {f"{module}.lora_E.default": mask for module, mask in kept.items()}

    oracle = make_oracle(tmp_path, "llama", config, prepare=prune)
    source = spectra.open_source(oracle.adapter, oracle.base)
    names = [f"{module}.weight" for module in kept]
    assert [source[name].max_rank for name in names] == [2, 0]
    assert_matches(source, oracle.deltas | {names[1]: torch.zeros(16, 16).double()})
    assert [spectrum.status for spectrum in spectra.decompose(source)] == ["ok", "unchanged"]


def test_a_recipe_survives_pickling(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"]))
    delta = spectra.open_source(oracle.adapter).deltas[0]
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())


MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"
CONFIG = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 6}


def factors(layer=0, r=3):
    module = MODULE.format(layer)
    return {
        f"{module}.lora_A": torch.randn(r, 5),
        f"{module}.lora_B": torch.randn(6, r),
        f"{module}.lora_E": torch.randn(r, 1),
    }


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "lora_B is missing"),
        (lambda t: {k: v for k, v in t.items() if "lora_E" not in k}, "lora_E is missing"),
        (lambda t: {k: v.T for k, v in t.items()}, "are not"),
        (lambda t: {k: v.to(torch.int32) for k, v in t.items()}, "not as real numbers"),
        (lambda t: factors(r=2), "3 ranks are left, the factors have 2"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(tmp_path, mutate, reason):
    write_adapter(tmp_path, factors(1) | mutate(factors()), CONFIG)
    source = spectra.open_source(tmp_path)
    assert reason in source.coverage.unsupported["model.layers.0.self_attn.q_proj.weight"]
    assert source["model.layers.1.self_attn.q_proj.weight"].read().shape == (6, 5)


def test_a_tensor_that_is_not_known_is_refused(tmp_path):
    write_adapter(tmp_path, factors(0) | factors(1), CONFIG)
    assert_an_unknown_tensor_is_refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_r": 0}, "init_r = 0"),
        ({"init_r": None}, "init_r = None"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"rank_pattern": {"a.lora_E": 3}}, "not an object of module: mask"),
        ({"peft_type": "LORA"}, "says peft_type 'LORA', the tensors"),
    ],
)
def test_an_unusable_config_is_named(tmp_path, change, message):
    write_adapter(tmp_path, factors(), CONFIG | change)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(tmp_path)


def test_a_missing_config_and_a_missing_lora_e_everywhere(tmp_path):
    write_adapter(tmp_path / "none", factors(), None)
    with pytest.raises(SourceError, match="put it back"):
        spectra.open_source(tmp_path / "none")
    write_adapter(tmp_path / "plain", {k: v for k, v in factors().items() if "lora_E" not in k}, CONFIG)
    with pytest.raises(SourceError, match="no tensor"):
        spectra.open_source(tmp_path / "plain")


def test_the_adapter_of_another_model_is_refused(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"]))
    other = make_oracle(tmp_path / "bert", "bert", peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(SourceError, match=r"is base= \(--base\) the model that was tuned"):
        spectra.open_source(oracle.adapter, other.base)
