"""Dumps of whole PEFT models: the weight under an adapter is compared with the base, or is the base."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from support.checkpoints import llama_tensors, write_checkpoint
from support.peft_oracle import assert_matches

import spectra
from spectra.errors import BaseRequiredError, SourceError

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def factors():
    torch.manual_seed(1)
    return torch.randn(2, 16), torch.randn(16, 2)


def update():
    A, B = factors()
    return 2 * B.double() @ A.double()


def dump(folder, base, *, moved=0.0, config=CONFIG, changes=None):
    """What zero_to_fp32.py writes: base_layer and factors for the adapted module, all other weights whole."""
    A, B = factors()
    tensors = {name: tensor.clone() for name, tensor in base.items() if name != WEIGHT} | (changes or {})
    tensors[f"{MODULE}.base_layer.weight"] = base[WEIGHT] + moved
    tensors |= {f"{MODULE}.lora_A.default.weight": A, f"{MODULE}.lora_B.default.weight": B}
    folder.mkdir()
    torch.save({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_config_beside_it_is_used_and_everything_is_compared(tmp_path):
    base = llama_tensors(layers=1)
    other = "model.layers.0.mlp.up_proj.weight"
    moved = base[other] + 0.5
    source = spectra.open_source(
        dump(tmp_path / "dump", base, changes={other: moved}), write_checkpoint(tmp_path / "base", base)
    )
    assert source.kind == "lora"
    matrices = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in base.items() if t.ndim == 2}
    assert_matches(source, matrices | {WEIGHT: update(), other: moved.double() - base[other].double()})
    assert source[WEIGHT].factored
    assert set(source.coverage.skipped.values()) == {
        "a vector, not a matrix",
        "the base weight: compared with the base when ΔW is read",
    }


def test_a_base_layer_that_moved_has_no_number_and_the_message_says_by_how_much(tmp_path):
    base = llama_tensors(layers=1)
    share = float((0.25 * torch.ones(16, 16)).norm() / base[WEIGHT].norm())
    source = spectra.open_source(dump(tmp_path / "dump", base, moved=0.25), write_checkpoint(tmp_path / "base", base))
    found = {spectrum.name: spectrum for spectrum in spectra.decompose(source)}
    assert found[WEIGHT].status == "unreadable"
    assert f"differs by {share:.2g} of its norm" in found[WEIGHT].reason
    assert all(spectrum.status == "unchanged" for name, spectrum in found.items() if name != WEIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_to_the_type_of_training_is_no_difference(dtype, tmp_path):
    base = llama_tensors(layers=1)
    cast = {name: tensor.to(dtype).float() for name, tensor in base.items()}  # trained in it, written in float32
    source = spectra.open_source(dump(tmp_path / "dump", cast), write_checkpoint(tmp_path / "base", base))
    assert torch.allclose(source[WEIGHT].read().to_dense(), update(), rtol=0, atol=1e-12)


def test_one_entry_that_is_no_number_is_a_difference(tmp_path):
    base = llama_tensors(layers=1)
    spoilt = base | {WEIGHT: base[WEIGHT].clone()}
    spoilt[WEIGHT][3, 4] = float("nan")
    source = spectra.open_source(dump(tmp_path / "dump", spoilt), write_checkpoint(tmp_path / "base", base))
    with pytest.raises(SourceError, match="differs by"):
        source[WEIGHT].read()


def test_without_a_base_the_base_layer_is_the_base(tmp_path):
    base = llama_tensors(layers=1)
    source = spectra.open_source(dump(tmp_path / "dump", base))
    (delta,) = source
    assert torch.allclose(delta.read().to_dense(), update(), rtol=0, atol=1e-12)
    assert delta.read().base_norm == pytest.approx(float(base[WEIGHT].norm()))
    assert torch.equal(delta.base.read(), base[WEIGHT].double())
    assert source.base is None
    assert "pass base= (--base)" in source.coverage.skipped["model.embed_tokens.weight"]


def test_dora_in_a_dump_needs_no_base(tmp_path):
    base = llama_tensors(layers=1)
    magnitude = torch.rand(16) + 0.5
    folder = dump(
        tmp_path / "dump",
        base,
        config=CONFIG | {"use_dora": True},
        changes={f"{MODULE}.lora_magnitude_vector.default.weight": magnitude},
    )
    (delta,) = spectra.open_source(folder)
    weight = base[WEIGHT].double()
    moved = weight + update()
    expected = magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
    assert torch.allclose(delta.read().to_dense(), expected, rtol=0, atol=1e-12)


def test_recipes_stay_small_and_know_what_they_open(tmp_path):
    base = llama_tensors(layers=1)
    folder = write_checkpoint(tmp_path / "base", base)
    delta = spectra.open_source(dump(tmp_path / "dump", base), folder)[WEIGHT]
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())
    assert {ref.path for ref in delta.refs} == {
        str(folder / "model.safetensors"),
        str(tmp_path / "dump" / "pytorch_model.bin"),
    }


def test_saved_copies_and_their_originals(tmp_path):
    base = llama_tensors(layers=1)
    head = torch.randn(32, 16)
    changes = {
        "lm_head.original_module.weight": base["lm_head.weight"],
        "lm_head.modules_to_save.default.weight": head,
    }
    whole = {name: tensor for name, tensor in base.items() if name != "lm_head.weight"}
    folder = dump(tmp_path / "dump", whole, config=CONFIG | {"modules_to_save": ["lm_head"]}, changes=changes)
    source = spectra.open_source(folder, write_checkpoint(tmp_path / "base", base))
    assert torch.equal(source["lm_head.weight"].read().to_dense(), head.double() - base["lm_head.weight"].double())
    assert "the original" in source.coverage.skipped["lm_head.original_module.weight"]


def test_a_dump_without_its_config_asks_for_the_scale_and_says_that_none_is_there(tmp_path):
    folder = dump(tmp_path / "dump", llama_tensors(layers=1), config=None)
    with pytest.raises(SourceError, match=r"no adapter_config.json beside it.* pass scale= \(--scale\)"):
        spectra.open_source(folder)


def test_only_weights_saved_whole_need_the_base(tmp_path):
    base = llama_tensors(layers=1)
    tensors = {"base_model.model.lm_head.modules_to_save.default.weight": base["lm_head.weight"]}
    tensors["base_model.model.model.norm.ln_tuning_layers.weight"] = torch.ones(16)
    (tmp_path / "a").mkdir()
    torch.save(tensors, tmp_path / "a" / "pytorch_model.bin")
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LN_TUNING", "modules_to_save": ["lm_head"]})
    )
    with pytest.raises(BaseRequiredError, match="no matrix of it can be done"):
        spectra.open_source(tmp_path / "a")
