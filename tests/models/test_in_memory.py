"""Models in memory: the same updates as from their files, and what is said where memory is a trap."""

from __future__ import annotations

import pickle

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.tiny_models import tiny_model

import spectra
from spectra.errors import BaseRequiredError, SelectionError, SourceError, UnsupportedFormatError

LORA = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
CONFIGS = {
    "lora": LORA,
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "kept whole": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def llama():
    return tiny_model("LlamaForCausalLM", "llama", tie_word_embeddings=False)


def adapted(config, seed=1):
    """A PEFT model after some training."""
    model = get_peft_model(llama(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_same(one, other):
    assert set(one.names) == set(other.names)
    for delta in other:
        assert torch.equal(one[delta.name].read().to_dense(), delta.read().to_dense()), delta.name


def test_state_dicts_and_modules_are_what_their_files_are(tmp_path):
    base = llama_tensors()
    tuned = nudged(base)
    paths = write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base)
    expected = spectra.open_source(*paths)
    for sides in ((tuned, base), (paths[0], base), (tuned, paths[1])):
        assert_same(spectra.open_source(*sides), expected)
    source = spectra.open_source(tuned, base)
    assert source.tuned == source.base == "the state dict in memory"
    found = spectra.decompose(source, top=2).collect()
    assert all(spectrum.status == "ok" for spectrum in found)
    assert found.names == source.names


def test_a_module_is_paired_with_its_checkpoint(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    found = spectra.decompose(spectra.open_source(model, tmp_path / "base")).collect()
    changed = [spectrum.name for spectrum in found if spectrum.status == "ok"]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    assert len(found) > 10


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_peft_model_is_its_saved_adapter_with_its_base_inside(kind, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(CONFIGS[kind])
    model.save_pretrained(tmp_path / "adapter")
    expected = spectra.open_source(tmp_path / "adapter", tmp_path / "base")
    assert len(expected) >= 2
    for given in (tmp_path / "base", base, model):
        assert_same(spectra.open_source(model, given), expected)
    if kind != "kept whole":
        alone = spectra.open_source(model)
        assert_same(alone, expected)
        assert all(delta.base is not None for delta in alone)


def test_a_model_of_transformers_may_have_taken_the_adapter_itself(tmp_path):
    model = llama()
    model.add_adapter(LORA)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    expected = spectra.open_source(tmp_path / "adapter")
    assert expected.kind == "lora"
    assert_same(spectra.open_source(model), expected)


def test_only_the_active_adapter_counts():
    model = adapted(LORA)
    first = spectra.open_source(model)["model.layers.0.self_attn.q_proj.weight"].read().to_dense()
    model.add_adapter("other", LORA)
    again = spectra.open_source(model)
    assert torch.equal(again["model.layers.0.self_attn.q_proj.weight"].read().to_dense(), first)
    model.set_adapter("other")
    assert torch.equal(spectra.open_source(model).deltas[0].read().to_dense(), torch.zeros(first.shape).double())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(SourceError, match=r"2 active adapters \(default, other\); model.set_adapter"):
        spectra.open_source(model)


def test_an_adapter_that_is_merged_for_now_is_refused_on_both_sides(tmp_path):
    model = adapted(LORA)
    model.merge_adapter()
    for sides in ((model,), (nudged(llama_tensors()), model)):
        with pytest.raises(SourceError, match=r"merged into its weights; call model\.unmerge_adapter"):
            spectra.open_source(*sides)
    model.unmerge_adapter()
    assert spectra.open_source(model).kind == "lora"


def test_the_same_tensors_on_both_sides_are_no_base():
    model = llama()
    before = model.state_dict()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(SourceError, match=r"are the same tensors, so ΔW would be 0 .* copy the base before training"):
        spectra.open_source(model, before)
    copied = {name: tensor.clone() for name, tensor in before.items()}
    assert spectra.open_source(model, copied).kind == "checkpoint"
    with pytest.raises(BaseRequiredError, match="pass base="):
        spectra.open_source(model)


def test_a_tensor_that_is_trained_on_after_opening_has_no_number():
    base = llama_tensors()
    tuned = nudged(base)
    source = spectra.open_source(tuned, base)
    tuned["lm_head.weight"].mul_(2)
    found = spectra.decompose(source).collect()
    assert found["lm_head.weight"].status == "unreadable"
    assert "was changed after it was opened; open it again" in found["lm_head.weight"].reason
    assert sum(spectrum.status == "ok" for spectrum in found) == len(found) - 1
    frozen = {name: tensor for name, tensor in base.items() if "q_proj" in name}
    with torch.inference_mode():
        moved = {name: tensor + 1 for name, tensor in frozen.items()}
    assert all(spectrum.status == "ok" for spectrum in spectra.decompose(spectra.open_source(moved, frozen)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "int is no kind of model"),
        ({}, "holds no tensors"),
        ({"step": 3}, "has 'step', of type int"),
    ],
)
def test_what_is_no_model(given, words):
    with pytest.raises(SourceError, match=words):
        spectra.open_source(given)


def test_memory_cannot_be_resumed_extracted_from_or_sent_away(tmp_path):
    base = llama_tensors()
    source = spectra.open_source(nudged(base), base)
    with pytest.raises(SelectionError, match="in memory, which out= cannot recognise again"):
        spectra.decompose(source, out=tmp_path / "run").collect()
    with pytest.raises(SelectionError, match="in memory: save it and open the folder"):
        spectra.extract(source, tmp_path / "lora", rank=2)
    with pytest.raises(SourceError, match="does not travel to other processes"):
        pickle.dumps(source.deltas[0])


def test_adapters_of_this_toolkit_are_to_be_saved_first(tmp_path):
    from spectra.adapters import MultiLoRAConfig, inject_adapter, save_adapter

    base = llama()
    base.save_pretrained(tmp_path / "base")
    config = MultiLoRAConfig(r=2, num_modules=2, alpha=2, target_modules=["q_proj"])
    model = inject_adapter(llama(), config)
    with pytest.raises(UnsupportedFormatError, match="save_adapter"):
        spectra.open_source(model)
    save_adapter(model, tmp_path / "adapter")
    assert_same(
        spectra.open_source(tmp_path / "adapter", model), spectra.open_source(tmp_path / "adapter", tmp_path / "base")
    )


def test_a_state_dict_of_an_adapter_needs_its_scale(tmp_path):
    model = adapted(LORA)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="scale"):
        spectra.open_source(tensors)
    assert_same(spectra.open_source(tensors, scale=3.0), spectra.open_source(tmp_path / "adapter"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_in_memory_is_looked_at_and_not_touched(dtype):
    base = {name: tensor.to(dtype) for name, tensor in llama_tensors(layers=1).items()}
    model = adapted(CONFIGS["dora"]).to(dtype)
    held = [nudged(base), base, dict(model.state_dict())]
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in held]
    versions = [{name: tensor._version for name, tensor in tensors.items()} for tensors in held]
    source = spectra.open_source(held[0], base)
    for some in (source, spectra.open_source(model)):
        assert all(spectrum.status in ("ok", "unchanged") for spectrum in spectra.decompose(some, top=2))
        spectra.alignment(some, k=2)
        spectra.interference([some, some])
        assert len(list(spectra.compare(some, some, top=2))) == len(some)
    for tensors, kept, numbers in zip(held, before, versions, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())
        assert {name: tensor._version for name, tensor in tensors.items()} == numbers
