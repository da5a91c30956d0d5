"""What is saved loads again, and opens with `spectra.open_source` as exactly merged − base."""

from __future__ import annotations

import json

import pytest
import torch
from adapted import CONFIGS, TARGETS, adapted_model, config_for, layer, logits
from safetensors.torch import load_file, save_file
from support.peft_oracle import assert_matches, save_model, tiny_model
from torch import nn

import spectra
from spectra.training import AdapterError, inject_adapter, load_adapter, merge_adapter, save_adapter
from spectra.training.inject import attached
from spectra.training.targets import is_conv1d

DEFINITIONS = [
    (name, heads) for name in CONFIGS for heads in (("mean",) if name == "multilora" else ("mean", "sum", 1))
]


def merged_minus_base(model, base, heads):
    """In Linear orientation, by the name of the weight."""
    named = None if isinstance(next(iter(attached(model).values()))[1], spectra.training.MultiLoRA) else heads
    layers = list(attached(model))
    merge_adapter(model, heads=named)
    deltas = {}
    for name in layers:
        delta = model.get_submodule(name).weight.detach() - base.get_submodule(name).weight.detach()
        deltas[f"{name}.weight"] = delta.T if is_conv1d(base.get_submodule(name)) else delta
    return deltas


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("name", "heads"), DEFINITIONS)
def test_the_analysis_reads_merged_minus_base(kind, name, heads, tmp_path):
    base, model = tiny_model(kind), adapted_model(name, kind)
    save_model(tmp_path / "base", base)
    save_adapter(model, tmp_path / "adapter")
    deltas = merged_minus_base(model, base, heads)
    for source in (
        spectra.open_source(tmp_path / "adapter", heads=heads),
        spectra.open_source(tmp_path / "adapter", tmp_path / "base", split=False, heads=heads),
    ):
        if isinstance(heads, int):  # one head of several is named so
            deltas = {f"{key.split('[')[0]}[head{heads}]": delta for key, delta in deltas.items()}
        assert_matches(source, deltas)
        assert source.kind == ("multilora" if name == "multilora" else "multihead")
        assert not source.coverage.unsupported
        assert not source.coverage.tuned_only
        assert not source.coverage.skipped
        ranks = {delta.max_rank for delta in source if min(delta.shape) > 8}
        assert ranks == {{"multilora": 6, "hydralora": 2}.get(name, 4)}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_round_trip_is_exact(kind, name, tmp_path):
    model = adapted_model(name, kind)
    assert save_adapter(model, tmp_path / "a") == tmp_path / "a"
    again = load_adapter(tiny_model(kind), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    trainable = {key for key, parameter in again.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    (configs,) = {adapter.config for _, adapter in attached(again).values()}
    assert configs == config_for(name, kind)
    save_adapter(again, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_files_hold_the_names_of_the_format(tmp_path):
    save_adapter(adapted_model("multilora"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    wanted = {"peft_type": "MULTILORA", "r": 2, "num_modules": 3, "lora_alpha": 3.0}
    assert wanted.items() <= config.items()
    assert config["target_modules"] == list(TARGETS["llama"])
    stored = load_file(tmp_path / "m" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.v_proj."
    shapes = {key.removeprefix(prefix): tuple(t.shape) for key, t in stored.items() if key.startswith(prefix)}
    assert shapes == {"multilora_A": (3, 2, 16), "multilora_B": (3, 8, 2), "multilora_scaling": (3, 8)}
    save_adapter(adapted_model("rlora routed"), tmp_path / "r")
    config = json.loads((tmp_path / "r" / "adapter_config.json").read_text())
    assert {"peft_type": "RLORA", "r": 2, "num_heads": 3, "lora_alpha": 3.0}.items() <= config.items()
    stored = load_file(tmp_path / "r" / "adapter_model.safetensors")
    shapes = {key.removeprefix(prefix): tuple(t.shape) for key, t in stored.items() if key.startswith(prefix)}
    assert shapes == {
        "rlora_A": (2, 16), "rlora_B": (3, 8, 2), "rlora_router": (3, 16),
        "rlora_offset_A": (2, 16), "rlora_offset_B": (8, 2),
    }  # fmt: skip


def test_what_is_trainable_beside_the_adapter_is_saved_whole(tmp_path):
    model = inject_adapter(tiny_model("bert"), config_for("rlora", "bert"))
    model.classifier.requires_grad_(True)
    with torch.no_grad():
        model.classifier.weight.add_(1)
        model.classifier.bias.add_(1)
    save_adapter(model, tmp_path / "a")
    again = load_adapter(tiny_model("bert"), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert again.classifier.weight.requires_grad
    base = save_model(tmp_path / "base", tiny_model("bert"))
    delta = spectra.open_source(tmp_path / "a", base)["classifier.weight"].read().to_dense()
    torch.testing.assert_close(delta, torch.ones_like(delta))
    model.bert.encoder.layer[0].attention.self.query.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"query.weight has an adapter and is trainable itself"):
        save_adapter(model, tmp_path / "b")


def test_merged_and_compiled_models_save_under_the_same_names(tmp_path):
    model = adapted_model("rlora")
    save_adapter(model, tmp_path / "a")
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    save_adapter(model, tmp_path / "part")
    save_adapter(merge_adapter(model), tmp_path / "merged")
    files = {(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "compiled", "merged")}
    assert len(files) == 1
    assert set(load_file(tmp_path / "part" / "adapter_model.safetensors")) == set(
        load_file(tmp_path / "a" / "adapter_model.safetensors")
    )


def test_a_bf16_base_gets_float32_adapters_back(tmp_path):
    save_adapter(adapted_model("multilora"), tmp_path)
    model = load_adapter(tiny_model("llama").bfloat16(), tmp_path)
    assert {p.dtype for _, adapter in attached(model).values() for p in adapter.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_what_cannot_be_saved_or_loaded_twice(tmp_path):
    with pytest.raises(AdapterError, match="no adapter to save"):
        save_adapter(nn.Linear(2, 2), tmp_path)
    model = layer(CONFIGS["multilora"])
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="has adapters already"):
        load_adapter(model, tmp_path)


def change(tmp_path, tensors=None, config=None):
    file = tmp_path / "adapter_model.safetensors"
    if tensors:
        save_file(load_file(file) | tensors, file)
    if config:
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))


FIRST = "base_model.model.0.multilora_"
DAMAGE = {
    "another rank": ({"config": {"r": 3}}, r"multilora_A has the shape \[3, 2, 8\], .* ask for \[3, 3, 8\]"),
    "a huge rank": ({"config": {"r": 10**12}}, "larger than both sides"),
    "more modules": ({"config": {"num_modules": 1000}}, r"ask for \[1000, 2, 8\]"),
    "another type": ({"config": {"peft_type": "RLORA", "num_heads": 3, "num_modules": None}}, "multilora_A"),
    "another layer": ({"tensors": {"base_model.model.9.multilora_A": torch.ones(3, 2, 8)}}, "the model has no such"),
    "not a linear layer": ({"tensors": {"base_model.model.1.multilora_A": torch.ones(3, 2, 8)}}, "it is a ReLU"),
    "NaN": ({"tensors": {FIRST + "A": torch.full((3, 2, 8), torch.nan)}}, "does not hold finite real numbers"),
    "whole numbers": ({"tensors": {FIRST + "A": torch.ones(3, 2, 8, dtype=torch.int32)}}, "finite real numbers"),
    "an unknown tensor": ({"tensors": {"base_model.model.0.lora_A": torch.ones(2)}}, "the model has nothing of that"),
    "another size": ({"tensors": {"base_model.model.0.bias": torch.ones(2)}}, r"0.bias \[2\], the model has \[6\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_in_one_line_and_the_model_is_untouched(damage, tmp_path):
    what, complaint = DAMAGE[damage]
    save_adapter(layer(CONFIGS["multilora"]), tmp_path)
    change(tmp_path, **what)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    with pytest.raises(AdapterError, match=complaint) as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert not attached(model)
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("adapter_config.json", None, "does not exist; give the directory"),
        ("adapter_config.json", b"{", "cannot be read"),
        ("adapter_config.json", b"\xff\xfe", "cannot be read"),
        ("adapter_config.json", b"[" * 100000, "cannot be read"),
        ("adapter_config.json", b"[]", "does not hold an object"),
        ("adapter_model.safetensors", None, "does not exist"),
        ("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is broken"),
        ("adapter_model.safetensors", b"", "is broken"),
    ],
)
def test_broken_files_are_named(file, content, complaint, tmp_path):
    save_adapter(layer(CONFIGS["multilora"]), tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(AdapterError, match=complaint) as caught:
        load_adapter(nn.Sequential(nn.Linear(8, 6)), tmp_path)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
