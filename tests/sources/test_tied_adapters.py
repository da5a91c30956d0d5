"""A tied head and its embedding are one weight: one ΔW, the sum of all that acts on it, under the stored name."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.peft_oracle import Oracle, assert_matches, make_oracle

import spectra
from spectra.deltas.recipes import InMemory, Summed
from spectra.errors import SourceError
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


@pytest.mark.parametrize("said", [True, False])
def test_a_head_alone_is_the_embedding_of_the_base(tmp_path, said):
    """No name of the adapter is in the base then."""
    oracle = tied_oracle(tmp_path, said, target_modules=["lm_head"])
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, {EMBEDDING: oracle.deltas[EMBEDDING]})
    assert "the update of lm_head.weight, tied to this weight" in source[EMBEDDING].note
    assert not source.coverage.tuned_only
    assert "compared with the base" in source.coverage.skipped["lm_head.base_layer.weight"]


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_without_all_of_the_heads_factors_the_sum_is_not_known(tmp_path, lost):
    oracle = tied_oracle(tmp_path, target_modules=["embed_tokens", "lm_head", "q_proj"])
    file = oracle.adapter / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if f"lm_head.{lost}" not in name}
    save_file(kept, file)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source[EMBEDDING].status == "unsupported"
    assert (
        f"tied to lm_head.weight, and one of their updates has no number: {lost} of lm_head" in source[EMBEDDING].reason
    )
    others = {delta.name for delta in source if delta.recipe is not None}
    assert others == oracle.deltas.keys() - {EMBEDDING, HEAD}


def test_a_head_alone_and_the_base_of_another_model(tmp_path):
    oracle = tied_oracle(tmp_path, target_modules=["lm_head"])
    wrong = {"other.weight": torch.randn(4, 4), EMBEDDING: torch.randn(8, 16)}
    (delta,) = spectra.open_source(oracle.adapter, write_checkpoint(tmp_path / "wrong", wrong))
    assert delta.status == "shape_mismatch"
    with pytest.raises(SourceError, match="no weight of the tuned model is in the base"):
        spectra.open_source(oracle.adapter, write_checkpoint(tmp_path / "none", {"other.weight": torch.randn(4, 4)}))


def test_a_head_alone_works_without_a_base(tmp_path):
    oracle = tied_oracle(tmp_path, target_modules=["lm_head"])
    assert_matches(spectra.open_source(oracle.adapter), {HEAD: oracle.deltas[EMBEDDING]})


def rewritten(adapter, change):
    """The adapter with its tensors changed."""
    file = adapter / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file)
    return adapter


def test_two_equal_copies_of_the_base_weight_say_that_it_is_one(tmp_path):
    """PEFT saves the base weight of an adapted head and of an adapted embedding."""
    oracle = tied_oracle(tmp_path, target_modules=["embed_tokens", "lm_head"])
    source = spectra.open_source(oracle.adapter)
    assert_matches(source, {EMBEDDING: oracle.deltas[EMBEDDING]})
    assert "the sum of its own update and that of lm_head.weight" in source[EMBEDDING].note
    assert source.coverage.warnings == ()


def apart(tensors, said):
    """What an older PEFT saves, or an untied model whose two weights differ, or are empty rows."""
    copies = {name: tensor for name, tensor in tensors.items() if "base_layer" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in copies}
    if said == "older":
        return rest
    (head, embedding) = sorted(copies)
    changed = {head: copies[head] + 1, embedding: copies[embedding]}
    return rest | (changed if said == "untied" else {name: torch.zeros_like(tensor) for name, tensor in copies.items()})


@pytest.mark.parametrize("said", ["older", "untied", "zeros"])
def test_without_a_base_a_pair_is_told_apart_and_the_doubt_is_said(tmp_path, said):
    oracle = tied_oracle(tmp_path, target_modules=["embed_tokens", "lm_head"])
    source = spectra.open_source(rewritten(oracle.adapter, lambda tensors: apart(tensors, said)))
    parts = [delta.read().to_dense() for delta in source]
    assert {delta.name for delta in source} == {EMBEDDING, HEAD}
    assert torch.allclose(sum(parts), oracle.deltas[EMBEDDING], rtol=0, atol=1e-12)
    doubt = any("one weight and ΔW is the sum of both" in warning for warning in source.coverage.warnings)
    assert doubt == (said != "untied")


@pytest.mark.parametrize("tie", [True, False])
def test_a_config_beside_the_adapter_says_that_they_are_one(tmp_path, tie):
    """A training checkpoint has the model's config beside the adapter."""
    oracle = tied_oracle(tmp_path, target_modules=["embed_tokens", "lm_head"])
    adapter = rewritten(oracle.adapter, lambda tensors: apart(tensors, "older"))
    (adapter / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tie}))
    source = spectra.open_source(adapter)
    if tie:
        assert_matches(source, {EMBEDDING: oracle.deltas[EMBEDDING]})
    else:
        assert {delta.name for delta in source} == {EMBEDDING, HEAD}


def dumped(folder, oracle, kind):
    """The whole PEFT model, as an FSDP full state dict or as safetensors' save_model, which drops one of two names."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    model.load_state_dict(load_file(oracle.base / "model.safetensors"), strict=False)
    model = peft.PeftModel.from_pretrained(model, str(oracle.adapter))
    folder.mkdir()
    (folder / "adapter_config.json").write_text((oracle.adapter / "adapter_config.json").read_text())
    if kind == "torch":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        save_model(model, str(folder / "model.safetensors"))
    return folder


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    "on", [["lm_head"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"], ["embed_tokens", "lm_head", "q_proj"]]
)
def test_a_dump_of_the_whole_model_has_one_update_of_the_tied_weight(tmp_path, on, with_base, kind):
    oracle = tied_oracle(tmp_path, target_modules=on)
    source = spectra.open_source(dumped(tmp_path / "dump", oracle, kind), oracle.base if with_base else None)
    if not with_base and kind == "safetensors" and on == ["lm_head"]:
        assert source.names == (EMBEDDING,)  # the header names the dropped one
    for name, expected in oracle.deltas.items():
        if name != HEAD:
            assert torch.allclose(source[name].read().to_dense(), expected, rtol=0, atol=1e-12)
    others = [delta for delta in source if delta.name not in oracle.deltas]
    assert {delta.status for delta in others} <= {"ok"}
    assert all(not delta.read().to_dense().any() for delta in others)


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


TIED = {
    "whisper": ("proj_out", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
                "max_source_positions": 8, "max_target_positions": 8, "bos_token_id": 1, "eos_token_id": 2,
                "decoder_start_token_id": 1}, transformers.WhisperForConditionalGeneration),
    "modernbert": ("decoder", {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
                   "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
                   transformers.ModernBertForMaskedLM),
    "biogpt": ("output_projection", {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
               "bos_token_id": 1, "eos_token_id": 2}, transformers.BioGptForCausalLM),
    "mamba": ("lm_head", {"num_hidden_layers": 1, "state_size": 4, "bos_token_id": 1, "eos_token_id": 2},
              transformers.MambaForCausalLM),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIED)
def test_heads_of_other_names_are_the_embedding(kind, tmp_path):
    head, options, cls = TIED[kind]
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "pad_token_id": 0, "tie_word_embeddings": True}
    model = cls(cls.config_class(**sizes | options)).double().eval()
    oracle = make_oracle(tmp_path, model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=[head]))
    written = {"model_type": kind, "tie_word_embeddings": True}
    (oracle.base / "config.json").write_text(json.dumps(written))
    (delta,) = spectra.open_source(oracle.adapter, oracle.base)
    assert tied.is_embedding(delta.name)
    assert torch.allclose(delta.read().to_dense(), oracle.deltas[delta.name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 32])
def test_a_classifier_that_is_called_as_a_head_is_not_the_embedding(rows, tmp_path):
    base = {name: tensor for name, tensor in llama_tensors().items() if name != HEAD}
    config = {"model_type": "llama", "tie_word_embeddings": True}
    folder = write_checkpoint(tmp_path / "base", base, config=config)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{q}.lora_A.weight": torch.randn(2, 16), f"{q}.lora_B.weight": torch.randn(16, 2)}
    tensors |= {"base_model.model.decoder.weight": torch.randn(rows, 16)}
    adapter = write_adapter(tmp_path / "adapter", tensors, CONFIG | {"modules_to_save": ["decoder"]})
    tuned = write_checkpoint(tmp_path / "tuned", base | {"decoder.weight": torch.randn(rows, 16)}, config=config)
    for source in (spectra.open_source(adapter, folder), spectra.open_source(tuned, folder)):
        assert ("decoder.weight" in source.coverage.tuned_only) == (rows == 3)
        assert ("decoder.weight" in source.names) == (rows == 32)


def test_what_may_be_something_else_is_no_vocabulary_for_certain():
    """A diffusion model's proj_out and a classifier's head, whose rows are no tokens."""
    assert tied.is_head("proj_out.weight")
    assert not tied.is_vocabulary("proj_out.weight")
    assert not any(map(tied.is_head, ("transformer.proj_out.weight", "model.decoder.weight", "head.weight")))


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
