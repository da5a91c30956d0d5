"""Packing against the slow way: every example alone."""

from __future__ import annotations

import pytest
import torch
from reproduce.tiny import tiny_model

from spectra.reproduce.base import load_model
from spectra.reproduce.batches import answer_logits, example_losses, examples_right, pack, tokenise
from spectra.reproduce.evaluate import evaluate
from spectra.reproduce.tasks import Example

EXAMPLES = [
    Example("a", "What is 2 + 2?", "4"),
    Example("b", "Spell cat backward", "tac"),
    Example("a", "Name a long word", "antidisestablishmentarianism"),
]


@pytest.fixture(scope="module")
def model_and_tokens(tmp_path_factory):
    model, tokenizer = load_model(tiny_model(tmp_path_factory.mktemp("tiny")), "cpu")
    return model.double().eval(), tokenise(EXAMPLES, tokenizer), tokenizer


def slow_loss(model, item):
    ids = torch.tensor([item.prompt + item.answer])
    log = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    places = range(len(item.prompt) - 1, ids.shape[1] - 1)
    return -torch.stack([log[place, ids[0, place + 1]] for place in places]).mean()


def test_losses_are_those_of_each_example_alone(model_and_tokens):
    model, tokens, _ = model_and_tokens
    batch = pack(tokens)
    with torch.no_grad():
        packed = example_losses(answer_logits(model, batch), batch)
        alone = torch.stack([slow_loss(model, item) for item in tokens])
    torch.testing.assert_close(packed.double(), alone, rtol=1e-5, atol=1e-6)


def test_right_means_that_greedy_decoding_gives_the_answer(model_and_tokens):
    model, tokens, _ = model_and_tokens
    start = torch.tensor([tokens[0].prompt])
    grown = model.generate(start, do_sample=False, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    said = grown[0, start.shape[1] :].tolist()
    right = type(tokens[0])("a", tokens[0].prompt, said)
    wrong = type(tokens[0])("a", tokens[0].prompt, [said[0], said[1], (said[2] + 1) % 200])
    batch = pack([right, wrong])
    with torch.no_grad():
        assert examples_right(answer_logits(model, batch), batch).tolist() == [True, False]


def test_no_token_sees_another_example(model_and_tokens):
    batch = pack(model_and_tokens[1])
    starts = [place for place in range(batch.ids.shape[1]) if batch.positions[0, place] == 0]
    assert len(starts) == len(EXAMPLES)
    for first, last in zip(starts, [*starts[1:], batch.ids.shape[1]], strict=True):
        assert not batch.mask[0, 0, first:last, :first].any()
        assert not batch.mask[0, 0, first:last, last:].any()
        assert torch.equal(
            batch.mask[0, 0, first:last, first:last], torch.ones(last - first, last - first).tril().bool()
        )


def test_the_end_token_is_learned(model_and_tokens):
    _, tokens, tokenizer = model_and_tokens
    assert all(item.answer[-1] == tokenizer.eos_token_id for item in tokens)
    assert tokenizer.decode(tokens[1].prompt + tokens[1].answer[:-1]) == "Spell cat backward\nAnswer: tac"


def test_scores_are_means_per_task(model_and_tokens):
    model, tokens, _ = model_and_tokens
    scores = evaluate(model, tokens)
    with torch.no_grad():
        assert scores["a"]["loss"] == pytest.approx(
            float(sum(slow_loss(model, tokens[i]) for i in (0, 2)) / 2), rel=1e-5
        )
    assert scores["a"]["examples"] == 2
    assert 0 <= scores["b"]["accuracy"] <= 1
