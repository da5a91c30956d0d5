"""Examples as token ids, packed into one row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectra.reproduce.tasks import Example


@dataclass(frozen=True)
class Tokens:
    """One example: the prompt's ids, then the answer's, which are what is learned."""

    task: str
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Batch:
    """Several examples behind each other in one row of L tokens.

    Attributes:
        ids: (1, L).
        positions: (1, L), from 0 in every example.
        mask: (1, 1, L, L), true where a token may look: at its own example, at itself and backwards.
        at: (a,) where a token of an answer is predicted.
        targets: (a,) that token.
        example: (a,) whose answer it belongs to.
        count: number of examples.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    at: Tensor
    targets: Tensor
    example: Tensor
    count: int


def tokenise(examples: Sequence[Example], tokenizer: Any) -> list[Tokens]:
    """`Question\\nAnswer: answer` and the end token; the same for every model, whatever its chat template."""
    end = [tokenizer.eos_token_id]
    return [
        Tokens(
            example.task,
            tokenizer(f"{example.question}\nAnswer:", add_special_tokens=False)["input_ids"],
            tokenizer(f" {example.answer}", add_special_tokens=False)["input_ids"] + end,
        )
        for example in examples
    ]


def pack(examples: Sequence[Tokens], device: str = "cpu") -> Batch:
    """Put examples behind each other; attention stays within each."""
    ids: list[int] = []
    positions: list[int] = []
    owner: list[int] = []
    at: list[int] = []
    example: list[int] = []
    for index, item in enumerate(examples):
        whole = item.prompt + item.answer
        first = len(ids) + len(item.prompt) - 1
        at += range(first, first + len(item.answer))
        example += [index] * len(item.answer)
        ids += whole
        positions += range(len(whole))
        owner += [index] * len(whole)
    row, segment, where = torch.tensor(ids), torch.tensor(owner), torch.tensor(at)
    mask = (segment[:, None] == segment[None, :]) & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return Batch(
        ids=row[None].to(device),
        positions=torch.tensor(positions)[None].to(device),
        mask=mask[None, None].to(device),
        at=where.to(device),
        targets=row[where + 1].to(device),
        example=torch.tensor(example).to(device),
        count=len(examples),
    )


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """(a, vocabulary): logits where answers are predicted, and nowhere else, which saves most of the output layer."""
    hidden = model.get_decoder()(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[0, batch.at])
    return logits


def example_losses(logits: Tensor, batch: Batch) -> Tensor:
    """(count,): each example's mean negative log-likelihood per answer token, in nats, so that long answers
    weigh no more than short ones."""
    each = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    zeros = torch.zeros(batch.count, device=each.device)
    return zeros.index_add(0, batch.example, each) / zeros.index_add(0, batch.example, torch.ones_like(each))


def examples_right(logits: Tensor, batch: Batch) -> Tensor:
    """(count,): whether greedy decoding gives exactly the answer, end token included.

    Every answer token is the most likely one after the right tokens before it: then greedy decoding walks along
    the answer, and otherwise it leaves it.
    """
    wrong = (logits.argmax(-1) != batch.targets).float()
    return torch.zeros(batch.count, device=wrong.device).index_add(0, batch.example, wrong) == 0
