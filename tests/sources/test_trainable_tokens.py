"""Trained rows of embeddings, alone and beside LoRA, against PEFT's own merge."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.checkpoints import VOCABULARY, llama_tensors, write_adapter, write_checkpoint
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.deltas.forms import Dense, LowRank
from spectra.errors import BaseRequiredError, SourceError

CASES = {
    "llama": ("llama", peft.TrainableTokensConfig(token_indices=[5, 0, 39], target_modules=["embed_tokens"])),
    "two modules": (
        "llama",
        peft.TrainableTokensConfig(token_indices=[7, 2], target_modules=["embed_tokens", "lm_head"]),
    ),
    "tied gpt2": ("gpt2", peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["wte"])),
    "more rows than columns": (
        "bert",
        peft.TrainableTokensConfig(token_indices=list(range(20)), target_modules=["word_embeddings"]),
    ),
    "beside lora": (
        "llama",
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=[4, 9]),
    ),
    "beside lora, by module": (
        "llama",
        peft.LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [4, 9], "lm_head": [3]},
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, config = CASES[case]
    oracle = make_oracle(tmp_path, kind, config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == ("lora" if "lora" in case else "trainable_tokens")
    deltas = oracle.deltas
    if case == "tied gpt2":  # the base holds the shared weight once
        assert torch.equal(deltas.pop("lm_head.weight"), deltas["transformer.wte.weight"])
        assert "tied" in source.coverage.skipped["lm_head.weight"]
    assert_matches(source, deltas)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only


def test_few_rows_are_factors_and_many_are_not(tmp_path):
    for count, form in ((3, LowRank), (20, Dense)):
        config = peft.TrainableTokensConfig(token_indices=list(range(count)), target_modules=["embed_tokens"])
        oracle = make_oracle(tmp_path / str(count), "llama", config)
        (delta,) = spectra.open_source(oracle.adapter, oracle.base)
        read = pickle.loads(pickle.dumps(delta)).read()
        assert isinstance(read, form)
        assert delta.factored == (form is LowRank)
        assert delta.max_rank == min(count, 16)
        assert read.base_norm > 0


def test_without_a_base_it_is_an_error_alone_and_a_line_beside_lora(tmp_path):
    alone = make_oracle(tmp_path / "alone", *CASES["llama"])
    with pytest.raises(BaseRequiredError, match=r"pass base= \(--base\)"):
        spectra.open_source(alone.adapter)
    beside = make_oracle(tmp_path / "beside", *CASES["beside lora"])
    source = spectra.open_source(beside.adapter)
    assert "pass base= (--base)" in source.coverage.skipped["model.embed_tokens.weight"]
    assert len(source) == 2


NAME = "base_model.model.model.embed_tokens.trainable_tokens_delta"
CONFIG = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]}


def opened(tmp_path, rows, config):
    write_adapter(tmp_path / "adapter", {NAME: rows}, config)
    return spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", llama_tensors()))


@pytest.mark.parametrize(
    ("rows", "indices", "reason"),
    [
        (torch.randn(3, 16), [1, 2], "are not [2, 16]"),
        (torch.randn(2, 15), [1, 2], "are not [2, 16]"),
        (torch.ones(2, 16, dtype=torch.int64), [1, 2], "not as real numbers"),
        (torch.randn(2, 16), [1, VOCABULARY], "resize its vocabulary"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, indices, reason):
    source = opened(tmp_path, rows, CONFIG | {"token_indices": indices})
    assert reason in source.coverage.unsupported["model.embed_tokens.weight"]
    assert source.deltas[0].status == "unsupported"


@pytest.mark.parametrize("indices", [None, [], [1, 1], [-1, 2], [True, 2], "12", {"lm_head": [1, 2]}])
def test_indices_that_say_nothing_are_named(tmp_path, indices):
    with pytest.raises(SourceError, match=r"which rows of model\.embed_tokens were trained"):
        opened(tmp_path, torch.randn(2, 16), CONFIG | {"token_indices": indices})


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(SourceError, match="put it back"):
        opened(tmp_path, torch.randn(2, 16), None)
