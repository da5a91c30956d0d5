"""Two configs: what differs is said, what only one says is not."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint

import spectra
from spectra.models.contradictions import contradictions

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "intermediate_size": 24,
}


def test_equal_configs_and_missing_ones_say_nothing():
    assert contradictions(LLAMA, LLAMA) == []
    assert contradictions({}, LLAMA) == contradictions(LLAMA, {}) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 6, "the base has 4 layers, the tuned model has 6 (num_hidden_layers)"),
        ("hidden_size", 32, "the base has 16 hidden units, the tuned model has 32 (hidden_size)"),
        ("num_attention_heads", 8, "the base has 4 attention heads, the tuned model has 8 (num_attention_heads)"),
        ("num_key_value_heads", 4, "the base has 2 key-value heads, the tuned model has 4 (num_key_value_heads)"),
        ("vocab_size", 40, "the base has 32 tokens in the vocabulary, the tuned model has 40 (vocab_size)"),
        (
            "intermediate_size",
            48,
            "the base has 24 units per feed-forward layer, the tuned model has 48 (intermediate_size)",
        ),
        ("model_type", "qwen2", "the base is of type 'llama', the tuned model of type 'qwen2' (model_type)"),
    ],
)
def test_each_size_is_said_once(key, value, said):
    assert contradictions(LLAMA | {key: value}, LLAMA) == [said]


def test_another_spelling_of_a_size_is_the_same_size():
    assert contradictions({"n_embd": 16, "n_layer": 4, "n_head": 4}, LLAMA) == []
    assert len(contradictions({"n_embd": 8}, LLAMA)) == 1


def test_the_language_part_of_a_composite_meets_a_plain_language_model():
    composite = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"hidden_size": 8, "depth": 2}}
    assert contradictions(composite, LLAMA) == []
    assert contradictions(composite, composite) == []
    other = composite | {"vision_config": {"hidden_size": 8, "depth": 3}}
    assert contradictions(other, composite) == ["in vision_config the base has 2 layers, the tuned model has 3 (depth)"]


@pytest.mark.parametrize("nonsense", [None, True, "4", 4.0, -4, [4]])
def test_what_is_no_positive_whole_number_is_not_compared(nonsense):
    assert contradictions(LLAMA | {"num_hidden_layers": nonsense}, LLAMA) == []


def test_a_pair_of_checkpoints_and_an_adapter_with_a_config_beside_it_say_it(tmp_path):
    base = write_checkpoint(tmp_path / "base", llama_tensors(), config=LLAMA)
    tuned = write_checkpoint(tmp_path / "tuned", nudged(llama_tensors()), config=LLAMA | {"num_key_value_heads": 4})
    said = "the base has 2 key-value heads, the tuned model has 4 (num_key_value_heads)"
    assert said in spectra.open_source(tuned, base).coverage.warnings
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{name}A.weight": torch.ones(2, 16), f"{name}B.weight": torch.ones(16, 2)}
    adapter = write_adapter(tmp_path / "adapter", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    assert not spectra.open_source(adapter, base).coverage.warnings
    (adapter / "config.json").write_bytes((tuned / "config.json").read_bytes())
    assert said in spectra.open_source(adapter, base).coverage.warnings
