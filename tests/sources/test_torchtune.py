"""torchtune's adapters: whose rows are reordered, where α is, and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint

import spectra
from spectra.errors import SourceError

MODULE, NAME = "layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj.weight"
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def factors(rows=16):
    torch.manual_seed(0)
    return {f"{MODULE}.lora_a.weight": torch.randn(2, 16), f"{MODULE}.lora_b.weight": torch.randn(rows, 2)}


def as_stored(tensors, s=1.0):
    a, b = (tensor.double() for tensor in tensors.values())
    return s * b @ a


def in_transformers_order(update):
    """Four heads of width 4: of Meta's rows 0, 1, 2, 3 the halves are (0, 2) and (1, 3)."""
    return update[[4 * head + row for head in range(4) for row in (0, 2, 1, 3)]]


def close(found, expected):
    assert found.status == "ok", found.reason
    assert torch.allclose(found.read().to_dense(), expected, rtol=0, atol=1e-12 * float(expected.norm()))


def base(folder, config):
    return write_checkpoint(folder / "base", llama_tensors(), config=config)


@pytest.mark.parametrize(
    ("kind", "reorder"), [("llama", True), ("mistral", True), ("gemma2", True), ("qwen2", False), ("qwen3", False)]
)
def test_rows_of_q_are_reordered_for_the_models_whose_weights_torchtune_reorders(kind, reorder, tmp_path):
    tensors = factors()
    source = spectra.open_source(
        write_adapter(tmp_path / "a", tensors, CONFIG), base(tmp_path, {"model_type": kind, **HEADS})
    )
    expected = as_stored(tensors, 2)
    close(source[NAME], in_transformers_order(expected) if reorder else expected)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "olmo", **HEADS}, "not known for model_type 'olmo'"),
        ({"model_type": "llama"}, "does not say how many heads"),
        ({"model_type": "llama", "num_attention_heads": 3}, "are not 3 heads"),
    ],
)
def test_an_order_of_rows_that_is_not_known_is_refused(config, words, tmp_path):
    source = spectra.open_source(write_adapter(tmp_path / "a", factors(), CONFIG), base(tmp_path, config))
    assert words in source[NAME].reason


def test_a_base_in_torchtunes_own_names_has_its_own_order(tmp_path):
    tensors = factors()
    native = write_checkpoint(tmp_path / "base", {f"{MODULE}.weight": torch.randn(16, 16)})
    source = spectra.open_source(write_adapter(tmp_path / "a", tensors, CONFIG), native)
    close(source[f"{MODULE}.weight"], as_stored(tensors, 2))


def test_alpha_is_in_the_recipe_so_s_must_be_given(tmp_path):
    tensors = factors()
    torch.save(tensors, tmp_path / "adapter_0.pt")
    with pytest.raises(SourceError, match=r"pass scale= \(--scale\)"):
        spectra.open_source(tmp_path)
    (found,) = spectra.open_source(tmp_path, scale=0.25)
    close(found, as_stored(tensors, 0.25))
    assert "torchtune's order" in found.note


@pytest.mark.parametrize("name", [f"{MODULE}.lora_c.weight", f"{MODULE}_x.weight", f"{MODULE}.scores"])
def test_a_tensor_that_no_rule_knows_takes_the_number_of_its_module(name, tmp_path):
    source = spectra.open_source(write_adapter(tmp_path, factors() | {name: torch.ones(2, 2)}, CONFIG))
    assert source[NAME].status == "unsupported"
    assert "is no part of" in source[NAME].reason


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (factors(), CONFIG | {"r": 4}, "the config says r = 4"),
        (factors() | {f"{MODULE}.lora_b.weight": torch.ones(16, 3)}, CONFIG, "cannot be multiplied"),
        (factors(), CONFIG | {"use_dora": True}, "the magnitude of layers.0.attn.q_proj is missing"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused(tensors, config, words, tmp_path):
    (found,) = spectra.open_source(write_adapter(tmp_path, tensors, config))
    assert words in found.reason


@pytest.mark.parametrize("split", [True, False])
def test_phi3s_fused_projections_take_the_parts_that_torchtune_keeps_apart(split, tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"layers.0.attn.k_proj.lora_{letter}.weight": torch.randn(s) for letter, s in (("a", (2, 16)), ("b", (8, 2)))
    }
    tensors |= {
        f"layers.0.mlp.w3.lora_{letter}.weight": torch.randn(s) for letter, s in (("a", (2, 16)), ("b", (24, 2)))
    }
    names = ("model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight")
    held = {names[0]: torch.randn(32, 16), names[1]: torch.randn(48, 16)}
    config = {"model_type": "phi3", "hidden_size": 16, **HEADS}
    folder = write_checkpoint(tmp_path / "base", held, config=config)
    source = spectra.open_source(write_adapter(tmp_path / "a", tensors, CONFIG), folder, split=split)
    assert len(source) == 2
    a, b, down, up = (tensor.double() for tensor in tensors.values())
    for name, part, rows, update in (
        (names[0], "k", slice(16, 24), 2 * b @ a),
        (names[1], "up", slice(24, 48), 2 * up @ down),
    ):
        if split:
            close(source[f"{name}[{part}]"], update)
            assert torch.equal(source[f"{name}[{part}]"].base.read(), held[name][rows].double())
        else:
            whole = torch.zeros_like(held[name]).double()
            whole[rows] = update
            close(source[name], whole)


@pytest.mark.parametrize(
    ("more", "config", "words"),
    [
        (
            {f"{MODULE}.magnitude": torch.ones(16)},
            {"model_type": "phi3", "hidden_size": 16, **HEADS},
            "DoRA of q alone",
        ),
        ({}, {"model_type": "phi3"}, "does not follow from the base's config.json"),
    ],
)
def test_a_part_that_cannot_be_placed_is_refused(more, config, words, tmp_path):
    name = "model.layers.0.self_attn.qkv_proj.weight"
    folder = write_checkpoint(tmp_path / "base", {name: torch.randn(32, 16)}, config=config)
    (found,) = spectra.open_source(write_adapter(tmp_path / "a", factors() | more, CONFIG), folder)
    assert words in found.reason
