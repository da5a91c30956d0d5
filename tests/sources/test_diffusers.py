"""Dotted files of image models, against formulas written out entry by entry."""

from __future__ import annotations

import json

import pytest
import torch
from support.pipeline import FLAT, IN, OUT, PATH, R, close, file, lora, only, pipeline, product, randn

import spectra
from spectra.errors import SourceError

NAMES = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "kohya's words": ("unet.{}.lora_down.weight", "unet.{}.lora_up.weight"),
    "lora as a child": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "lora_linear_layer": ("unet.{}.lora_linear_layer.down.weight", "unet.{}.lora_linear_layer.up.weight"),
    "old processors": (
        "unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight",
        "unet.down_blocks.0.attentions.0.processor.to_q_lora.up.weight",
    ),
    "older, without a component": (
        "down_blocks.0.attentions.0.processor.to_q_lora.down.weight",
        "down_blocks.0.attentions.0.processor.to_q_lora.up.weight",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_diffusers_names(case, tmp_path):
    base, _ = pipeline(tmp_path / "base")
    down, up = (name.format(PATH) for name in NAMES[case])
    plain = lora(alpha=None)
    tensors = dict(zip((down, up), plain.values(), strict=True))
    source = spectra.open_source(file(tmp_path, tensors), base, scale=1.0)
    assert source.kind == "diffusers"
    close(only(source, f"unet.{PATH}.weight"), product(plain, s=1.0))
    assert any(f"s = 1 as given for unet.{PATH}" in w for w in source.coverage.warnings) or "older" in case
    alone = spectra.open_source(file(tmp_path, tensors), base / "unet", scale=0.5)
    close(only(alone, f"{PATH}.weight"), product(plain, s=0.5))


def test_the_output_of_an_old_processor_and_of_a_text_encoder(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    plain = lora(FLAT, IN, OUT, alpha=None)
    encoder = lora("e", 8, 8, alpha=None)
    tensors = {
        "unet.down_blocks.0.attentions.0.processor.to_out_lora.down.weight": plain[f"{FLAT}.lora_down.weight"],
        "unet.down_blocks.0.attentions.0.processor.to_out_lora.up.weight": plain[f"{FLAT}.lora_up.weight"],
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": encoder["e.lora_down.weight"],
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": encoder["e.lora_up.weight"],
    }
    source = spectra.open_source(file(tmp_path, tensors), base, scale=1.0)
    close(source["unet.down_blocks.0.attentions.0.to_out.0.weight"], product(plain, s=1.0))
    close(source["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"], product(encoder, "e", 1.0))


def test_the_config_in_the_header(tmp_path):
    plain = lora(alpha=None)
    tensors = dict(zip((f"unet.{PATH}.lora_A.weight", f"unet.{PATH}.lora_B.weight"), plain.values(), strict=True))
    config = {"unet.r": 8, "unet.lora_alpha": 3, "unet.use_rslora": True, "unet.rank_pattern": {"to_q": R}}
    source = spectra.open_source(file(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)}))
    close(only(source), product(plain, s=3 / 2**0.5))
    assert not source.coverage.warnings
    wrong = spectra.open_source(
        file(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config | {"unet.rank_pattern": {}})})
    )
    assert "the header says r = 8" in wrong.deltas[0].reason
    with pytest.raises(SourceError, match="not a JSON object"):
        spectra.open_source(file(tmp_path, tensors, {"lora_adapter_metadata": "[1]"}))


def test_dora_under_diffusers_names(tmp_path):
    base, weights = pipeline(tmp_path / "base")
    plain = lora(alpha=None)
    tensors = dict(zip((f"unet.{PATH}.lora_A.weight", f"unet.{PATH}.lora_B.weight"), plain.values(), strict=True))
    magnitude = tensors[f"unet.{PATH}.lora_magnitude_vector"] = torch.rand(OUT, dtype=torch.float64)
    weight = weights[f"unet.{PATH}.weight"]
    merged = weight + product(plain, s=1.0)
    delta = only(spectra.open_source(file(tmp_path, tensors), base, scale=1.0))
    close(delta, (magnitude / merged.norm(dim=1))[:, None] * merged - weight)


def test_a_language_models_lora_without_a_config_is_not_taken_for_an_image_models(tmp_path):
    names = ("transformer.h.0.attn.c_attn.lora_A.weight", "transformer.h.0.attn.c_attn.lora_B.weight")
    path = file(tmp_path, dict(zip(names, lora(alpha=None).values(), strict=True)))
    with pytest.raises(SourceError, match=r"pass scale= \(--scale\)"):
        spectra.open_source(path)


def factors(path=f"unet.{PATH}"):
    return dict(zip((f"{path}.lora_A.weight", f"{path}.lora_B.weight"), lora(alpha=None).values(), strict=True))


@pytest.mark.parametrize(
    ("stranger", "named"),
    [
        (f"unet.{PATH}.lora_xs", "lora_xs"),
        (f"unet.{PATH}.lora_A_extra.weight", "lora_A_extra"),
        (f"unet.{PATH}_gate.weight", "gate"),
        (f"unet.{PATH}_lora_A.weight", "_lora_A"),
        (f"unet.{PATH}.lora_down.weight", "lora_A"),  # one of the two is not read
    ],
)
@pytest.mark.parametrize("processor", [False, True])
def test_a_tensor_under_a_modules_path_that_no_rule_knows_costs_the_module_its_number(
    stranger, named, processor, tmp_path
):
    tensors = factors() | {stranger: randn(R, R)} | factors("unet.other")
    if processor:
        new, old = f"unet.{PATH}", f"unet.{PATH.removesuffix('to_q')}processor.to_q_lora"
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    source = spectra.open_source(file(tmp_path, tensors), scale=1.0)
    assert source[f"unet.{PATH}.weight"].status == "unsupported"
    assert named in source.coverage.unsupported[f"unet.{PATH}.weight"]
    assert source["unet.other.weight"].status == "ok"


def test_a_layers_own_parameters_and_the_rest_of_a_file_are_listed(tmp_path):
    own = {f"unet.{PATH}.weight": randn(OUT, IN), f"unet.{PATH}.base_layer.weight": randn(OUT, IN)}
    biases = {f"unet.{PATH}.bias": randn(OUT), f"unet.{PATH}.lora_B.bias": randn(OUT)}
    source = spectra.open_source(file(tmp_path, factors() | own | biases | {"unet.norm.weight": randn(4)}), scale=1.0)
    close(only(source, f"unet.{PATH}.weight"), product(lora(alpha=None), s=1.0))
    assert set(source.coverage.skipped) == {*own, *biases, "unet.norm.weight"}
