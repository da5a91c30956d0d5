"""What PEFT builds on LoRA's factors: DoRA, KaSA, block-diagonal factors, changed bases, attention and tied weights."""

from __future__ import annotations

import json
import pickle
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.peft_oracle import assert_matches, make_oracle, tiny_model
from torch import nn

import spectra
from spectra.errors import BaseRequiredError, UnsupportedFormatError

# PEFT decomposes the base in float32 and stores the residual so: 1e-7 of ‖W‖, which here is ten times ‖ΔW‖ at most.
FLOAT32 = 3e-6


class Net(nn.Module):
    """Layers that language models lack: convolutions in one and two dimensions, and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 4, 1)
        self.signal = nn.Conv1d(4, 5, 3)
        self.attend = nn.MultiheadAttention(8, 2)
        self.table = nn.Embedding(10, 8)
        self.last = nn.Linear(8, 3)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


DORA = {
    "linear": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj"], "use_rslora": True}),
    "conv1d": ("gpt2", {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head"]}),
    "convolution": (net, {"r": 2, "lora_alpha": 3, "target_modules": ["image", "point", "signal", "table", "last"]}),
}


@pytest.mark.parametrize("case", DORA)
def test_dora_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = DORA[case]
    oracle = make_oracle(tmp_path, kind() if callable(kind) else kind, peft.LoraConfig(use_dora=True, **options))
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == "dora"
    assert_matches(source, oracle.deltas)
    base = load_file(oracle.base / "model.safetensors")
    for delta in source:
        assert not delta.factored
        assert delta.read().base_norm == pytest.approx(float(base[delta.name].norm()), rel=1e-12)
        assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())


def test_dora_of_a_fused_projection_comes_in_parts(tmp_path):
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True)
    oracle = make_oracle(tmp_path, "gpt2", config)
    parts = {f"{n}[{p}]": d[i * 16 : (i + 1) * 16] for n, d in oracle.deltas.items() for i, p in enumerate("qkv")}
    assert_matches(spectra.open_source(oracle.adapter, oracle.base), parts)


def test_dora_needs_the_base(tmp_path):
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"])
    oracle = make_oracle(tmp_path, "llama", config)
    with pytest.raises(BaseRequiredError, match=r"DoRA depends on the base weights: pass base= \(--base\)"):
        spectra.open_source(oracle.adapter)


def dora(folder, config=None, **changes):
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.randn(2, 16),
        f"{module}.lora_B.weight": torch.randn(16, 2),
        f"{module}.lora_magnitude_vector": torch.rand(16),
    }
    tensors |= {f"{module}.{slot}": tensor for slot, tensor in changes.items() if tensor is not None}
    for slot in [slot for slot, tensor in changes.items() if tensor is None]:
        del tensors[f"{module}.{slot}"]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True} | (config or {})
    return write_adapter(folder / "adapter", tensors, config), write_checkpoint(folder / "base", llama_tensors(1))


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({"lora_magnitude_vector": None}, {}, "use_dora = True, and lora_magnitude_vector of"),
        ({}, {"use_dora": False}, "use_dora = False, and lora_magnitude_vector of"),
        ({"lora_magnitude_vector": torch.rand(15)}, {}, r"magnitude \[15\] does not fit the update \[16, 16\]"),
        ({"lora_magnitude_vector": torch.ones(16, dtype=torch.int32)}, {}, "stored as I32"),
    ],
)
def test_a_dora_that_contradicts_itself_is_refused(changes, config, reason, tmp_path):
    source = spectra.open_source(*dora(tmp_path, config, **changes))
    (delta,) = source
    assert delta.status == "unsupported"
    assert re.search(reason, delta.reason), delta.reason


def test_a_magnitude_under_its_name_in_memory_gives_the_same(tmp_path):
    adapter, base = dora(tmp_path)
    first = spectra.open_source(adapter, base).deltas[0].read().to_dense()
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {
        name.replace("_vector", "_vector.default.weight").replace(".weight.weight", ".weight"): t
        for name, t in tensors.items()
    }
    renamed = {
        n.replace("lora_A.w", "lora_A.default.w").replace("lora_B.w", "lora_B.default.w"): t for n, t in renamed.items()
    }
    save_file(renamed, adapter / "adapter_model.safetensors")
    assert torch.equal(spectra.open_source(adapter, base).deltas[0].read().to_dense(), first)


CHANGED = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": peft.KasaConfig() if hasattr(peft, "KasaConfig") else {}},
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True},
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_the_initialisation_took_from_the_base_is_subtracted(case, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj", "down_proj"], **CHANGED[case])
    oracle = make_oracle(tmp_path, tiny_model("llama").float(), config, dtype=torch.float32)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, oracle.deltas, FLOAT32)
    for delta in source:
        assert "taken for the original" in delta.note
        assert delta.max_rank == (min(delta.shape) if "dora" in case else 6)
        assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())


def test_pissa_on_a_conv1d_in_parts(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa")
    oracle = make_oracle(tmp_path, tiny_model("gpt2").float(), config, dtype=torch.float32)
    parts = {f"{n}[{p}]": d[i * 16 : (i + 1) * 16] for n, d in oracle.deltas.items() for i, p in enumerate("qkv")}
    assert_matches(spectra.open_source(oracle.adapter, oracle.base), parts, FLOAT32)


def test_an_untrained_pissa_adapter_changes_nothing_relative_to_the_original(tmp_path):
    """PEFT's own initial values: s·B₀·A₀ is what was taken out."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights="pissa")
    model = tiny_model("llama").float()
    oracle = make_oracle(tmp_path, model, config, dtype=torch.float32)
    fresh = peft.get_peft_model(tiny_model("llama").float(), config)
    fresh.save_pretrained(tmp_path / "fresh")
    for delta in spectra.open_source(tmp_path / "fresh", oracle.base):
        form = delta.read()
        assert float(form.to_dense().norm()) < 1e-6 * form.base_norm


def test_without_the_base_the_note_says_what_the_number_is_relative_to(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights="olora")
    oracle = make_oracle(tmp_path, tiny_model("llama").float(), config, dtype=torch.float32)
    (delta, *_) = spectra.open_source(oracle.adapter)
    assert "relative to the residual base that init_lora_weights='olora' left" in delta.note
    tensors = load_file(oracle.adapter / "adapter_model.safetensors")
    A, B = (tensors[name].double() for name in sorted(tensors)[:2])
    assert torch.allclose(delta.read().to_dense(), 5 / 3 * B @ A, rtol=1e-14)


@pytest.mark.parametrize(
    ("init", "what"),
    [
        ("pissa_niter_4", "residual base"),
        ("corda", "residual base"),
        ("lora_ga", "residual base"),
        ("loftq", "quantised base"),
        ("eva", ""),
        ("orthogonal", ""),
        ("gaussian", ""),
        (True, ""),
    ],
)
def test_only_initialisations_that_change_the_base_get_a_note(init, what, tmp_path):
    adapter, base = dora(tmp_path, {"use_dora": False, "init_lora_weights": init}, lora_magnitude_vector=None)
    (delta,) = spectra.open_source(adapter, base)
    assert what in delta.note
    assert bool(delta.note) == bool(what)


def test_pissa_leaves_embeddings_alone(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"], init_lora_weights="pissa")
    oracle = make_oracle(tmp_path, tiny_model("llama").float(), config, dtype=torch.float32)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, oracle.deltas, FLOAT32)
    assert source["model.embed_tokens.weight"].note == ""


def test_olora_on_a_conv1d_is_refused(tmp_path):
    oracle = make_oracle(tmp_path, "gpt2", peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    path = oracle.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "olora"}))
    assert {delta.status for delta in spectra.open_source(oracle.adapter, oracle.base)} == {"unsupported"}


def test_block_diagonal_factors(tmp_path):
    blocks = peft.tuners.lora.config.BdLoraConfig(
        target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False
    )
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"], use_bdlora=blocks)
    oracle = make_oracle(tmp_path, "llama", config)
    for source in (spectra.open_source(oracle.adapter, oracle.base), spectra.open_source(oracle.adapter)):
        assert_matches(source, oracle.deltas)
        assert all(delta.factored and delta.max_rank == 4 for delta in source)


@pytest.mark.parametrize("options", [{"nblocks": 3}, {"nblocks": "2"}, {"target_modules_bd_a": ["q_proj"]}, 7])
def test_blocks_that_do_not_fit_are_refused(options, tmp_path):
    known = {"target_modules_bd_a": [], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    given = known | options if isinstance(options, dict) else options
    changes = {"lora_magnitude_vector": None, "lora_B.weight": torch.randn(16, 1)}
    adapter, base = dora(tmp_path, {"use_dora": False, "use_bdlora": given}, **changes)
    (delta,) = spectra.open_source(adapter, base)
    assert delta.status == "unsupported"
    assert "block" in delta.reason


def test_convolutions_and_fused_attention(tmp_path):
    targets = ["image", "point", "signal", "attend"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, rank_pattern={"attend": 3})
    oracle = make_oracle(tmp_path, net(), config)
    for base in (oracle.base, None):
        source = spectra.open_source(oracle.adapter, base)
        assert_matches(source, oracle.deltas)
    assert "attend.in_proj_weight" in {delta.name for delta in source}
    assert "twice" in source["attend.out_proj.weight"].note


def test_biases_are_listed_and_do_not_change_the_matrices(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["query"], lora_bias=True, bias="none")
    oracle = make_oracle(tmp_path, "bert", config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, oracle.deltas)
    assert sum("lora_B.bias" in name for name in source.coverage.skipped) == 2
    lone = make_oracle(tmp_path / "all", "bert", peft.LoraConfig(r=2, target_modules=["query"], bias="all"))
    source = spectra.open_source(lone.adapter, lone.base)
    assert_matches(source, lone.deltas)
    assert set(source.coverage.skipped.values()) == {"a bias, not a matrix"}


def test_a_saved_head_is_untied_from_the_base(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, modules_to_save=["lm_head"])
    oracle = make_oracle(tmp_path, "gpt2", config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, {n: d for n, d in oracle.deltas.items() if n in {x.name for x in source}})
    assert "lm_head.weight" in {delta.name for delta in source}


def test_a_saved_classifier_that_the_bare_encoder_lacks_is_listed(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    oracle = make_oracle(tmp_path, "bert", config)
    tensors = load_file(oracle.base / "model.safetensors")
    bare = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
    save_file(bare, oracle.base / "model.safetensors")
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.coverage.tuned_only == {"classifier.weight": "saved whole, and not in the base"}
    expected = {n.removeprefix("bert."): d for n, d in oracle.deltas.items() if "query" in n}
    assert_matches(source, expected)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("use_qalora", True, "QA-LoRA"),
    ],
)
def test_variants_without_one_update_are_refused_by_name(option, value, named, tmp_path):
    adapter, base = dora(tmp_path, {"use_dora": False, option: value}, lora_magnitude_vector=None)
    with pytest.raises(UnsupportedFormatError, match=named):
        spectra.open_source(adapter, base)


def test_replicated_layers_keep_their_own_names_and_no_base(tmp_path):
    adapter, base = dora(
        tmp_path, {"use_dora": False, "layer_replication": [[0, 1], [0, 1]]}, lora_magnitude_vector=None
    )
    source = spectra.open_source(adapter, base)
    assert any("layer_replication" in warning for warning in source.coverage.warnings)
    assert source.deltas[0].read().base_norm is None


def test_what_takes_the_base_is_refused_with_replicated_layers(tmp_path):
    """The base is there: to pass one is no advice."""
    replicated = {"layer_replication": [[0, 1], [0, 1]]}
    with pytest.raises(UnsupportedFormatError, match="after layer_replication the layers have other numbers"):
        spectra.open_source(*dora(tmp_path / "dora", replicated))
    adapter, base = dora(tmp_path / "saved", replicated | {"use_dora": False}, lora_magnitude_vector=None)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.randn(32, 16)}, adapter / "adapter_model.safetensors")
    source = spectra.open_source(adapter, base)
    assert source["lm_head.weight"].status == "unsupported"
    assert "with layer_replication the base is not used" in source["lm_head.weight"].reason


def test_trained_tokens_beside_the_factors(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]})
    oracle = make_oracle(tmp_path, "llama", config)
    assert_matches(spectra.open_source(oracle.adapter, oracle.base), oracle.deltas)
    alone = spectra.open_source(oracle.adapter)
    assert "pass base= (--base)" in alone.coverage.skipped["model.embed_tokens.weight"]
    assert len(alone) == 2


def test_what_serves_training_only_is_listed(tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], monteclora_config=peft.tuners.lora.config.MontecloraConfig()
    )
    oracle = make_oracle(tmp_path, "llama", config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, oracle.deltas)
    assert any("sampler" in name and "training only" in why for name, why in source.coverage.skipped.items())


def test_a_head_that_the_file_calls_by_its_older_name(tmp_path):
    base = write_checkpoint(
        tmp_path / "base", {"embed_out.weight": torch.randn(9, 4)}, config={"model_type": "gpt_neox"}
    )
    prefix, A, B = "base_model.model.lm_head", torch.randn(2, 4), torch.randn(9, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    path = write_adapter(tmp_path / "a", {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}, config)
    (delta,) = spectra.open_source(path, base)
    assert delta.name == "embed_out.weight"
    assert torch.allclose(delta.read().to_dense(), 2 * B.double() @ A.double())
