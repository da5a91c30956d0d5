"""LoRA files of image models and the places where their components are in a base."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.pipeline import FLAT, IN, OUT, close, file, lora, product, randn

import spectra
from spectra.errors import SourceError

WORDS = ("lora_down.weight", "lora_up.weight")
BLOCK = "double_blocks.0.img_attn.proj"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
COMFY = {
    f"diffusion_model.{BLOCK}": BLOCK,
    f"text_encoders.clip_l.transformer.{CLIP}": CLIP,
    f"text_encoders.t5xxl.transformer.{T5}": T5,
}


def comfy(*modules, words=WORDS):
    """One file with modules of the same factors, and their update for α = 3."""
    plain = lora()
    tensors = {}
    for module in modules or COMFY:
        tensors |= dict(zip((f"{module}.{word}" for word in (*words, "alpha")), plain.values(), strict=True))
    return tensors, product(plain)


def components(folder, **weights):
    """A pipeline of components with these weights, each (OUT, IN)."""
    folder.mkdir()
    index = {"_class_name": "Pipeline"}
    for component, names in weights.items():
        index[component] = ["diffusers", "Model"]
        (folder / component).mkdir()
        save_file({f"{name}.weight": randn(OUT, IN) for name in names}, folder / component / "model.safetensors")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def single_file(folder, *names):
    path = folder / "model.safetensors"
    save_file({f"{name}.weight": randn(OUT, IN) for name in names}, path)
    return path


def test_comfyuis_names_without_a_base_are_the_files_own(tmp_path):
    tensors, update = comfy()
    source = spectra.open_source(file(tmp_path, tensors))
    assert {delta.name for delta in source} == {f"{module}.weight" for module in COMFY}
    for delta in source:
        close(delta, update)
    assert not source.coverage.skipped


def test_comfyuis_names_against_a_pipeline(tmp_path):
    base = components(tmp_path / "base", transformer=[BLOCK], text_encoder=[CLIP], text_encoder_2=[T5])
    tensors, update = comfy()
    source = spectra.open_source(file(tmp_path, tensors), base)
    places = ("transformer", BLOCK), ("text_encoder", CLIP), ("text_encoder_2", T5)
    assert {delta.name for delta in source} == {f"{place}.{path}.weight" for place, path in places}
    for delta in source:
        close(delta, update)
        assert delta.base.name == delta.name
    assert "what the file calls 'diffusion_model.' is 'transformer.' in the base" in source.coverage.warnings


def test_comfyuis_names_against_a_single_file(tmp_path):
    names = [f"model.diffusion_model.{BLOCK}", *list(COMFY)[1:]]
    tensors, update = comfy()
    source = spectra.open_source(file(tmp_path, tensors), single_file(tmp_path, *names))
    assert {delta.name for delta in source} == {f"{name}.weight" for name in names}
    for delta in source:
        close(delta, update)


def test_what_the_base_lacks_keeps_its_row(tmp_path):
    tensors, update = comfy()
    source = spectra.open_source(file(tmp_path, tensors), single_file(tmp_path, BLOCK))
    close(source[f"{BLOCK}.weight"], update)
    lost = {delta.name: delta.reason for delta in source if delta.status != "ok"}
    assert lost == {f"{module}.weight": "not in the base" for module in list(COMFY)[1:]}


@pytest.mark.parametrize("words", [WORDS, ("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")])
def test_names_without_a_component(words, tmp_path):
    path = "transformer_blocks.0.attn.to_q"
    tensors, update = comfy(path, words=words)
    adapter = file(tmp_path, tensors)
    pipeline = components(tmp_path / "pipeline", transformer=[path], vae=["decoder.conv"])
    for base, name in ((None, path), (pipeline, f"transformer.{path}"), (pipeline / "transformer", path)):
        source = spectra.open_source(adapter, base)
        assert source.kind == "diffusers"
        (delta,) = source
        assert delta.name == f"{name}.weight"
        close(delta, update)


def test_a_component_that_fits_two_places_is_not_guessed(tmp_path):
    base = components(tmp_path / "base", transformer=[BLOCK], transformer_2=[BLOCK])  # as in pipelines with two experts
    for module in (BLOCK, f"diffusion_model.{BLOCK}"):
        with pytest.raises(SourceError, match=r"fits 'transformer\.' and 'transformer_2\.' of the base"):
            spectra.open_source(file(tmp_path, comfy(module)[0]), base)
    named, update = comfy(f"transformer_2.{BLOCK}")
    (delta,) = spectra.open_source(file(tmp_path, named), base)
    assert delta.name == f"transformer_2.{BLOCK}.weight"
    close(delta, update)


def test_two_names_of_one_weight_leave_it_without_a_number(tmp_path):
    tensors, _ = comfy(f"unet.{BLOCK}", f"diffusion_model.{BLOCK}")
    source = spectra.open_source(file(tmp_path, tensors), single_file(tmp_path, f"model.diffusion_model.{BLOCK}"))
    assert [delta.status for delta in source] == ["unsupported"]
    assert "both stand for" in source.deltas[0].reason


def test_flat_and_dotted_names_in_one_file(tmp_path):
    tensors, update = comfy(f"transformer.{BLOCK}")
    source = spectra.open_source(file(tmp_path, tensors | lora()))
    assert {delta.name for delta in source} == {f"transformer.{BLOCK}.weight", f"{FLAT}.weight"}
    for delta in source:
        close(delta, update)


def test_changes_of_norms_and_biases_are_no_matrices(tmp_path):
    tensors, update = comfy(f"diffusion_model.{BLOCK}")
    vectors = {f"diffusion_model.{BLOCK}.diff_b": randn(OUT), "diffusion_model.norm3.diff": randn(IN)}
    vectors |= {"diffusion_model.norm3.diff_b": randn(IN), "diffusion_model.head.diff_b": randn(3)}
    vectors |= {"diffusion_model.norm_q.diff": randn(IN, 1, 1), "diffusion_model.blocks.0.diff_m": randn(1, 6, IN)}
    vectors |= {"diffusion_model.norm_k.w_norm": randn(IN), "diffusion_model.norm_k.b_norm": randn(IN)}
    vectors |= {"diffusion_model.norm2.set_weight": randn(IN)}
    matrix = randn(OUT, IN)
    source = spectra.open_source(file(tmp_path, tensors | vectors | {"diffusion_model.head.head.diff": matrix}))
    close(source[f"diffusion_model.{BLOCK}.weight"], update)
    close(source["diffusion_model.head.head.weight"], matrix)
    assert len(source) == 2
    assert source.coverage.skipped == dict.fromkeys(vectors, "the change of a bias or a norm, not a matrix")


@pytest.mark.parametrize("beside", ["diff", "set_weight"])
@pytest.mark.parametrize("shape", [(OUT, IN), (OUT,)])
def test_a_second_rule_for_one_weight_costs_it_its_number(beside, shape, tmp_path):
    module = f"diffusion_model.{BLOCK}"
    tensors, _ = comfy(module)
    (delta,) = spectra.open_source(file(tmp_path, tensors | {f"{module}.{beside}": torch.ones(shape)}))
    assert delta.status == "unsupported"


def test_new_values_are_no_update(tmp_path):
    tensors, update = comfy(f"diffusion_model.{BLOCK}")
    source = spectra.open_source(file(tmp_path, tensors | {"diffusion_model.x.set_weight": torch.ones(OUT, IN)}))
    assert "new values instead of an update" in source["diffusion_model.x.weight"].reason
    close(source[f"diffusion_model.{BLOCK}.weight"], update)


def test_factors_that_belong_to_no_module_cost_all_their_numbers(tmp_path):
    tensors, _ = comfy(f"diffusion_model.{BLOCK}")
    (delta,) = spectra.open_source(file(tmp_path, tensors | {"other.lora_C.weight": torch.ones(2, 2)}))
    assert "other.lora_C.weight [2, 2], above" in delta.reason
