"""A tied head and its embedding are one weight: one ΔW, the sum of all that acts on it, under the stored name."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.peft_oracle import Oracle, assert_matches, make_oracle

import spectra
from spectra.deltas.recipes import InMemory, Summed
from spectra.models import tied

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def tied_oracle(folder, said=True, **options) -> Oracle:
    """A tiny LLaMA whose head is its embedding, stored once, with a random LoRA."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    oracle = make_oracle(folder, model, peft.LoraConfig(r=2, lora_alpha=6, **options))
    if said:
        written = {"model_type": "llama", "tie_word_embeddings": True}
        (oracle.base / "config.json").write_text(json.dumps(written))
    return oracle


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("on", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_what_acts_on_a_tied_weight_adds_up_under_its_stored_name(on, said, tmp_path):
    oracle = tied_oracle(tmp_path, said, target_modules=[*on, "q_proj"])
    expected = {name: delta for name, delta in oracle.deltas.items() if name != HEAD}
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, expected)
    assert ("tied" in source[EMBEDDING].note) == ("lm_head" in on)
    assert source[EMBEDDING].max_rank == 2 * len(on)
    stored = load_file(oracle.base / "model.safetensors")[EMBEDDING]
    assert source[EMBEDDING].read().base_norm == pytest.approx(float(stored.norm()))
    assert not source.coverage.tuned_only


def test_a_head_alone_works_without_a_base(tmp_path):
    oracle = tied_oracle(tmp_path, target_modules=["lm_head"])
    assert_matches(spectra.open_source(oracle.adapter), {HEAD: oracle.deltas[EMBEDDING]})


def test_without_a_base_a_pair_is_told_apart_and_the_doubt_is_said(tmp_path):
    oracle = tied_oracle(tmp_path, target_modules=["embed_tokens", "lm_head"])
    source = spectra.open_source(oracle.adapter)
    parts = [delta.read().to_dense() for delta in source]
    assert len(parts) == 2
    assert torch.allclose(sum(parts), oracle.deltas[EMBEDDING], rtol=0, atol=1e-12)
    assert any("one weight and ΔW is the sum of both" in warning for warning in source.coverage.warnings)


def test_a_head_that_is_saved_whole_is_untied(tmp_path):
    base = {name: tensor for name, tensor in llama_tensors().items() if name != HEAD}
    folder = write_checkpoint(tmp_path / "base", base, config={"model_type": "llama", "tie_word_embeddings": True})
    A, B, head = torch.randn(2, 32), torch.randn(16, 2), torch.randn(32, 16)
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": A,
        "base_model.model.model.embed_tokens.lora_embedding_B": B,
        "base_model.model.lm_head.weight": head,
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, CONFIG | {"modules_to_save": ["lm_head"]})
    source = spectra.open_source(adapter, folder)
    expected = {
        EMBEDDING: 2 * (B.double() @ A.double()).T,
        HEAD: head.double() - base[EMBEDDING].double(),
    }
    assert_matches(source, expected)


def test_an_untied_head_keeps_its_own_update(tmp_path):
    base = llama_tensors()
    A, B = torch.randn(2, 16), torch.randn(32, 2)
    tensors = {"base_model.model.lm_head.lora_A.weight": A, "base_model.model.lm_head.lora_B.weight": B}
    adapter = write_adapter(tmp_path / "adapter", tensors, CONFIG)
    for tie, name in ((False, HEAD), (True, EMBEDDING)):  # where the file has both, the config decides
        config = {"model_type": "llama", "tie_word_embeddings": tie}
        folder = write_checkpoint(tmp_path / str(tie), base, config=config)
        assert_matches(spectra.open_source(adapter, folder), {name: 2 * B.double() @ A.double()})


def test_a_head_that_an_untied_base_does_not_hold_is_not_taken_for_the_embedding(tmp_path):
    base = {name: tensor for name, tensor in llama_tensors().items() if name != HEAD}
    folder = write_checkpoint(tmp_path / "base", base, config={"model_type": "llama", "tie_word_embeddings": False})
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {"base_model.model.lm_head.lora_A.weight": torch.randn(2, 16)}
    tensors |= {"base_model.model.lm_head.lora_B.weight": torch.randn(32, 2)}
    tensors |= {f"{q}.lora_A.weight": torch.randn(2, 16), f"{q}.lora_B.weight": torch.randn(16, 2)}
    source = spectra.open_source(write_adapter(tmp_path / "adapter", tensors, CONFIG), folder)
    assert {delta.name: delta.status for delta in source} == {
        HEAD: "unsupported",
        "model.layers.0.self_attn.q_proj.weight": "ok",
    }
    assert source.coverage.tuned_only == {HEAD: "not in the base"}


def test_updates_that_depend_on_the_weight_do_not_add_up(tmp_path):
    oracle = tied_oracle(tmp_path, target_modules=["embed_tokens", "lm_head"], use_dora=True)
    (delta,) = spectra.open_source(oracle.adapter, oracle.base)
    assert (delta.name, delta.status) == (EMBEDDING, "unsupported")
    assert "depends on the weight, so they do not add up" in delta.reason


NAMES = ["model.embed_tokens.weight", "model.layers.0.q_proj.weight"]


@pytest.mark.parametrize(
    ("name", "names", "same", "config", "expected"),
    [
        (HEAD, NAMES, {}, {}, EMBEDDING),
        (HEAD, NAMES, {}, {"tie_word_embeddings": False}, None),
        (HEAD, [*NAMES, HEAD], {}, {}, None),
        (HEAD, [*NAMES, HEAD], {}, {"text_config": {"tie_word_embeddings": True}}, EMBEDDING),
        (HEAD, [*NAMES, HEAD], {HEAD: EMBEDDING}, {"tie_word_embeddings": False}, EMBEDDING),
        (HEAD, [*NAMES, "other.wte.weight"], {}, {}, None),
        (NAMES[1], NAMES, {}, {"tie_word_embeddings": True}, None),
    ],
)
def test_the_one_rule(name, names, same, config, expected):
    assert tied.stored_as(name, names, same, config) == expected


def test_a_sum_of_factors_stays_factored_and_one_with_a_matrix_does_not():
    left, right, matrix = torch.randn(5, 2), torch.randn(2, 4), torch.randn(5, 4)
    factors, dense = InMemory.of(left, right), InMemory.of(matrix)
    twice, mixed = Summed((factors, factors)), Summed((factors, dense))
    assert (twice.factored, mixed.factored) == (True, False)
    product = left.double() @ right.double()
    assert torch.allclose(twice.read().to_dense(), 2 * product)
    assert torch.allclose(mixed.read().to_dense(), product + matrix.double())
