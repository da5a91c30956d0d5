"""PEFT LoRA against PEFT's own merge, and what broken adapters get."""

from __future__ import annotations

import json
import pickle

import peft
import pytest
import torch
from support.checkpoints import write_adapter
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

CASES = {
    "plain": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": ["v_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 12,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 3},
            "alpha_pattern": {r"model.layers.\d+.mlp.up_proj": 7},
        },
    ),
    "embeddings and head": ("llama", {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"]}),
    "conv1d": ("gpt2", {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert": ("bert", {"r": 2, "lora_alpha": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "lora_bias": ("llama", {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.LoraConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == "lora"
    assert_matches(source, oracle.deltas)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only


def test_without_a_base_the_numbers_are_the_same_and_the_names_are_the_modules_own(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"]))
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas)


def test_modules_to_save_needs_the_base_and_says_so(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    oracle = make_oracle(tmp_path, "llama", config)
    assert "lm_head.weight" in oracle.deltas
    assert_matches(spectra.open_source(oracle.adapter, oracle.base), oracle.deltas)
    alone = spectra.open_source(oracle.adapter)
    assert "pass base= (--base)" in alone.coverage.skipped["lm_head.weight"]


def test_a_fused_projection_comes_in_parts_where_the_base_says_so(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True)
    oracle = make_oracle(tmp_path, "gpt2", config)
    parts = {
        f"{name}[{part}]": delta[i * 16 : (i + 1) * 16]
        for name, delta in oracle.deltas.items()
        for i, part in enumerate("qkv")
    }
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, parts)
    assert {delta.role for delta in source.select("v_proj")} == {"v_proj"}


def test_the_base_gives_its_norm(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"]))
    from safetensors.torch import load_file

    base = load_file(oracle.base / "model.safetensors")
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        assert delta.read().base_norm == pytest.approx(float(base[delta.name].norm()), rel=1e-12)


def test_deltas_are_small_picklable_recipes(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"]))
    delta = spectra.open_source(oracle.adapter).deltas[0]
    packed = pickle.dumps(delta)
    assert len(packed) < 3000
    assert torch.equal(pickle.loads(packed).read().to_dense(), delta.read().to_dense())
    assert delta.factored
    assert delta.max_rank == 4


def factors(r=2, out=6, inside=5, prefix="base_model.model.model.layers.0.self_attn.q_proj"):
    return {f"{prefix}.lora_A.weight": torch.randn(r, inside), f"{prefix}.lora_B.weight": torch.randn(out, r)}


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": "two"}, "r = 'two'"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"rank_pattern": [1]}, "not an object"),
    ],
)
def test_an_unusable_config_is_named(tmp_path, change, message):
    write_adapter(tmp_path, factors(), CONFIG | change)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(tmp_path)


def test_a_pattern_that_backtracks_forever_ends(tmp_path):
    tensors = factors(prefix="base_model.model.m." + "x" * 60)
    write_adapter(tmp_path, tensors, CONFIG | {"rank_pattern": {"(?:x|x)*[yz]": 3}})
    with pytest.raises(SourceError, match="takes forever"):
        spectra.open_source(tmp_path)


def test_a_missing_config_asks_for_the_scale(tmp_path):
    tensors = factors()
    write_adapter(tmp_path, tensors, None)
    with pytest.raises(SourceError, match=r"pass scale= \(--scale\)"):
        spectra.open_source(tmp_path)
    (delta,) = spectra.open_source(tmp_path, scale=0.5)
    A, B = (tensors[name].double() for name in sorted(tensors))
    assert torch.allclose(delta.read().to_dense(), 0.5 * B @ A)


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "lora_B of"),
        (lambda t: {k: v for k, v in t.items() if "lora_A" not in k}, "lora_A of"),
        (lambda t: {k: v.T for k, v in t.items()}, "cannot be multiplied"),
        (lambda t: {k: v.to(torch.int32) for k, v in t.items()}, "not as real numbers"),
        (lambda t: factors(r=3), "the config says r = 2"),
    ],
)
def test_a_module_that_cannot_be_read_keeps_its_row_and_the_others_are_done(tmp_path, mutate, reason):
    good = factors(prefix="base_model.model.model.layers.1.self_attn.q_proj")
    write_adapter(tmp_path, good | mutate(factors()), CONFIG)
    source = spectra.open_source(tmp_path)
    found = {spectrum.name: spectrum for spectrum in spectra.decompose(source)}
    bad = found["model.layers.0.self_attn.q_proj.weight"]
    assert bad.status == "unsupported"
    assert reason in bad.reason
    assert bad.name in source.coverage.unsupported
    assert found["model.layers.1.self_attn.q_proj.weight"].status == "ok"


def test_an_adapter_name_in_the_keys_is_accepted_and_two_are_not(tmp_path):
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in factors().items()}
    write_adapter(tmp_path / "one", named, CONFIG)
    assert len(spectra.open_source(tmp_path / "one")) == 1
    other = {name.replace(".default.", ".other."): tensor for name, tensor in named.items()}
    write_adapter(tmp_path / "two", named | {name: t.clone() for name, t in other.items()}, CONFIG)
    with pytest.raises(SourceError, match="several adapters"):
        spectra.open_source(tmp_path / "two")


def test_a_changed_base_is_said(tmp_path):
    write_adapter(tmp_path, factors(), CONFIG | {"init_lora_weights": "pissa_niter_4"})
    (delta,) = spectra.open_source(tmp_path)
    assert "residual base" in delta.note


def test_the_adapter_of_another_model_is_refused(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    other = make_oracle(tmp_path / "bert", "bert", peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(SourceError, match=r"is base= \(--base\) the model that was tuned"):
        spectra.open_source(oracle.adapter, other.base)


def test_scale_beside_a_config_is_ignored_aloud(tmp_path):
    write_adapter(tmp_path, factors(), CONFIG)
    source = spectra.open_source(tmp_path, scale=3.0)
    assert any("scale was ignored" in warning for warning in source.coverage.warnings)


def test_a_config_that_is_not_an_object(tmp_path):
    write_adapter(tmp_path, factors(), CONFIG)
    (tmp_path / "adapter_config.json").write_text(json.dumps([1, 2]))
    with pytest.raises(SourceError, match="not an object"):
        spectra.open_source(tmp_path)
