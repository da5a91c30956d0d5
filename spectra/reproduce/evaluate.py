"""Held-out loss and accuracy, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spectra.reproduce.batches import Tokens, answer_logits, example_losses, examples_right, pack

_AT_ONCE = 24  # examples per forward pass


def evaluate(model: Any, examples: Sequence[Tokens], device: str = "cpu") -> dict[str, dict[str, float]]:
    """Task → mean loss (nats per answer token, each example equally) and accuracy (share answered exactly).

    Example:
        {"chain_sum": {"loss": 1.25, "accuracy": 0.5, "examples": 24}, …}
    """
    model.eval()
    scores: dict[str, list[tuple[float, float]]] = {}
    with torch.no_grad():
        for start in range(0, len(examples), _AT_ONCE):
            part = examples[start : start + _AT_ONCE]
            batch = pack(part, device)
            logits = answer_logits(model, batch)
            losses, right = example_losses(logits, batch), examples_right(logits, batch)
            for item, loss, hit in zip(part, losses.tolist(), right.tolist(), strict=True):
                scores.setdefault(item.task, []).append((loss, float(hit)))
    return {
        task: {
            "loss": sum(loss for loss, _ in pairs) / len(pairs),
            "accuracy": sum(hit for _, hit in pairs) / len(pairs),
            "examples": len(pairs),
        }
        for task, pairs in scores.items()
    }
