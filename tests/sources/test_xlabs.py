"""XLabs' processors for Flux: both names of the base, components, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import write_checkpoint
from support.examples import EXAMPLES
from support.stored import rewritten, stored_tensors

import spectra

DOUBLE, SINGLE = "double_blocks.3.processor", "single_blocks.0.processor"


def factors(module, rows, columns=16):
    return {f"{module}.down.weight": torch.randn(2, columns), f"{module}.up.weight": torch.randn(rows, 2)}


def product(tensors, module):
    return tensors[f"{module}.up.weight"].double() @ tensors[f"{module}.down.weight"].double()


def write(folder, tensors):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "lora.safetensors")
    return folder


def close(found, expected):
    assert found.status == "ok", found.reason
    assert torch.allclose(found.read().to_dense(), expected, rtol=0, atol=1e-12 * float(expected.norm()))


def of_diffusers():
    """File and base, and what each of the base's weights is: q, k and v one after the other, as diffusers converts."""
    tensors, expected = {}, {}
    for module, names in {
        f"{DOUBLE}.qkv_lora1": [f"transformer_blocks.3.attn.to_{part}" for part in "qkv"],
        f"{DOUBLE}.qkv_lora2": [f"transformer_blocks.3.attn.add_{part}_proj" for part in "qkv"],
        f"{DOUBLE}.proj_lora1": ["transformer_blocks.3.attn.to_out.0"],
        f"{DOUBLE}.proj_lora2": ["transformer_blocks.3.attn.to_add_out"],
        f"{SINGLE}.qkv_lora": [f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"],
        f"{SINGLE}.proj_lora": ["single_transformer_blocks.0.proj_out"],
    }.items():
        tensors |= factors(module, 16 * len(names), 80 if module == f"{SINGLE}.proj_lora" else 16)
        for name, update in zip(names, product(tensors, module).chunk(len(names)), strict=True):
            expected[f"{name}.weight"] = update
    return tensors, expected


@pytest.mark.parametrize("component", ["", "transformer."])
def test_the_names_of_diffusers_as_a_component_or_on_their_own(component, tmp_path):
    tensors, expected = of_diffusers()
    held = {name: torch.randn(update.shape) for name, update in expected.items()}
    if component:
        base = tmp_path / "base"
        (base / "transformer").mkdir(parents=True)
        (base / "model_index.json").write_text(json.dumps({"_class_name": "X", "transformer": ["diffusers", "Flux"]}))
        save_file(held, base / "transformer" / "diffusion_pytorch_model.safetensors")
    else:
        base = write_checkpoint(tmp_path / "base", held, config={})
    source = spectra.open_source(write(tmp_path / "a", tensors), base)
    assert {delta.name for delta in source} == {component + name for name in expected}
    for name, update in expected.items():
        close(source[component + name], update)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_single_file_of_comfyui_as_base(prefix, tmp_path):
    module = f"{DOUBLE}.qkv_lora1"
    tensors = factors(module, 48)
    name = "model.diffusion_model.double_blocks.3.img_attn.qkv.weight"
    base = write_checkpoint(tmp_path / "base", {name: torch.randn(48, 16)}, config={})
    adapter = write(tmp_path / "a", {prefix + key: tensor for key, tensor in tensors.items()})
    close(spectra.open_source(adapter, base)[name], product(tensors, module))


def test_a_scale_changes_nothing_and_that_is_said(tmp_path):
    tensors = factors(f"{DOUBLE}.proj_lora1", 16)
    source = spectra.open_source(write(tmp_path / "a", tensors), scale=0.7)
    close(source["double_blocks.3.img_attn.proj.weight"], product(tensors, f"{DOUBLE}.proj_lora1"))
    assert any("scale was ignored" in warning for warning in source.coverage.warnings)


@pytest.mark.parametrize("shape", [(40, 16), (112, 8), (48,), ()])
def test_first_rows_that_the_base_does_not_have_are_a_mismatch(shape, tmp_path):
    base = write_checkpoint(tmp_path / "base", {"single_blocks.0.linear1.weight": torch.randn(shape)}, config={})
    (found,) = spectra.open_source(write(tmp_path / "a", factors(f"{SINGLE}.qkv_lora", 48)), base)
    assert found.status == "shape_mismatch"


@pytest.mark.parametrize("split", [True, False])
def test_the_update_of_linear1_has_zeros_after_the_rows_of_q_k_and_v(split, tmp_path):
    module, name = f"{SINGLE}.qkv_lora", "single_blocks.0.linear1.weight"
    tensors = factors(module, 48)
    adapter = write(tmp_path / "a", tensors)
    base = write_checkpoint(tmp_path / "base", {name: torch.randn(112, 16)}, config={})
    (found,) = spectra.open_source(adapter, base, split=split)
    assert found.name == name
    assert found.max_rank == 2
    close(found, torch.cat([product(tensors, module), torch.zeros(64, 16).double()]))
    (alone,) = spectra.open_source(adapter, split=split)
    assert alone.name == f"{name}[qkv]"
    close(alone, product(tensors, module))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{DOUBLE}.qkv_lora3", "no processor of Flux that is known"),
        (f"{DOUBLE}.qkv_lora", "no processor of Flux that is known"),
        (f"{SINGLE}.proj_lora1", "no processor of Flux that is known"),
    ],
)
def test_other_processors_are_refused(name, words, tmp_path):
    tensors = factors(f"{DOUBLE}.proj_lora1", 16) | factors(name, 16)
    assert words in spectra.open_source(write(tmp_path / "a", tensors))[f"{name}.weight"].reason


@pytest.mark.parametrize("name", ["alpha", "up.bias_scale", "gate.weight"])
def test_a_tensor_that_no_rule_knows_takes_the_number_of_its_module(name, tmp_path):
    tensors = factors(f"{DOUBLE}.proj_lora1", 16) | {f"{DOUBLE}.proj_lora1.{name}": torch.ones(2, 2)}
    source = spectra.open_source(write(tmp_path / "a", tensors))
    assert "is no part of" in source["double_blocks.3.img_attn.proj.weight"].reason


def test_rows_that_are_not_three_parts_are_refused(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"transformer_blocks.3.attn.add_q_proj.weight": torch.ones(5, 16)})
    (found,) = spectra.open_source(write(tmp_path / "a", factors(f"{DOUBLE}.qkv_lora2", 16)), base)
    assert "are not those of q, k and v" in found.reason


def test_factors_that_cannot_be_multiplied_are_refused(tmp_path):
    oracle = EXAMPLES["xlabs"](tmp_path / "o")
    changed = stored_tensors(oracle.adapter) | {"double_blocks.0.processor.proj_lora1.up.weight": torch.ones(16, 5)}
    source = spectra.open_source(rewritten(oracle.adapter, tmp_path / "a", changed), oracle.base)
    assert any("cannot be multiplied" in delta.reason for delta in source)
