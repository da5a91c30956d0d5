"""One training run: a plain loop that can be killed at any step and goes on to the same weights."""

from __future__ import annotations

import csv
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spectra.errors import StoreError
from spectra.reproduce.base import load_model
from spectra.reproduce.batches import Tokens, answer_logits, example_losses, pack, tokenise
from spectra.reproduce.evaluate import evaluate
from spectra.reproduce.folders import whole_folder
from spectra.reproduce.methods import attach, causal, save
from spectra.reproduce.plan import Plan, Run
from spectra.reproduce.tasks import Example
from spectra.results.writing import write

WARM_UP = 10  # steps over which the learning rate rises; constant afterwards, so that an early look is a short run
CLIP = 1.0
CHECKPOINT = "checkpoint.pt"
DONE = "result.json"
_LOG = ("step", "loss", "tokens", "seconds")

Progress = Callable[[int, float], None]


def snapshot(directory: Path, run: Run, step: int) -> Path:
    """Where the run's weights after `step` steps are."""
    return directory / "runs" / run.name / f"step-{step}"


def train(
    run: Run,
    plan: Plan,
    base: Path,
    data: tuple[Sequence[Example], Sequence[Example]],
    directory: Path,
    *,
    device: str = "cpu",
    progress: Progress = lambda step, loss: None,
) -> dict[str, Any]:
    """Train, look at held-out examples, save; a run that is finished is only read.

    Every step seeds its own random numbers and every checkpoint holds the weights and the optimiser, so a run
    that was killed ends with the weights of one that was not.

    Args:
        run: what to train.
        plan: sizes and intervals.
        base: the model's folder.
        data: training and held-out examples.
        directory: of the whole experiment.
        device: where.
        progress: called after each step.

    Returns:
        Settings, loss and accuracy per task at the early and the last step, seconds and tokens.

    Raises:
        StoreError: the folder holds the same run with other settings.
    """
    folder = directory / "runs" / run.name
    settings = {**asdict(run), "per_task": plan.per_task, "early": plan.early}
    finished = read_finished(folder, settings)
    if finished:
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "run.json", json.dumps(settings, indent=1).encode())
    torch.manual_seed(run.seed)
    model, tokenizer = load_model(base, device)
    model = attach(model, run.method)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=run.lr, weight_decay=0.0, fused=True)
    state = resume(folder, trained, optimiser)
    batches = order(tokenise(data[0], tokenizer), plan.per_task, run.seed)
    held_out = tokenise(data[1], tokenizer)
    for step in range(state["step"], run.steps):
        line = _step(model, optimiser, trained, batches[step], run, step, device)
        state["log"].append([step + 1, *line])
        state["step"] = step + 1
        progress(step + 1, line[0])
        if step + 1 in (plan.early, run.steps):
            state["scores"][str(step + 1)] = evaluate(causal(model), held_out, device)
            _save_snapshot(model, run, directory, step + 1)
        if (step + 1) % plan.checkpoint_every == 0 and step + 1 < run.steps:
            keep(folder, state, trained, optimiser)
    return _finish(folder, settings, state, sum(parameter.numel() for parameter in trained.values()))


def order(examples: Sequence[Tokens], per_task: int, seed: int) -> list[list[Tokens]]:
    """Batches that hold `per_task` examples of every task, each example once, in an order of the seed's."""
    tasks: dict[str, list[Tokens]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    rng = random.Random(seed)
    for items in tasks.values():
        rng.shuffle(items)
    steps = min(len(items) for items in tasks.values()) // per_task
    return [
        [item for items in tasks.values() for item in items[step * per_task : (step + 1) * per_task]]
        for step in range(steps)
    ]


def _step(
    model: Any,
    optimiser: torch.optim.Optimizer,
    trained: dict[str, torch.Tensor],
    examples: Sequence[Tokens],
    run: Run,
    step: int,
    device: str,
) -> tuple[float, int, float]:
    """Loss, tokens and seconds of one step."""
    start = time.perf_counter()
    torch.manual_seed(1_000_003 * run.seed + step)
    for group in optimiser.param_groups:
        group["lr"] = run.lr * min(1.0, (step + 1) / WARM_UP)
    model.train()
    batch = pack(examples, device)
    loss = example_losses(answer_logits(causal(model), batch), batch).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item(), batch.ids.numel(), time.perf_counter() - start


def read_finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run, or None.

    Raises:
        StoreError: the folder holds the same run with other settings.
    """
    there = folder / "run.json"
    if not there.is_file():
        return None
    if json.loads(there.read_text()) != json.loads(json.dumps(settings)):
        raise StoreError(f"{folder} holds this run with other settings; choose another --out or remove the folder")
    done = folder / DONE
    return json.loads(done.read_text()) if done.is_file() else None


def resume(folder: Path, trained: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The state to go on from; a checkpoint's weights are put into the model."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return {"step": 0, "log": [], "scores": {}}
    kept = torch.load(path, weights_only=True, map_location="cpu")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(kept["weights"][name])
    optimiser.load_state_dict(kept["optimiser"])
    return kept["state"]


def keep(
    folder: Path, state: dict[str, Any], trained: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer
) -> None:
    """Put the state, the weights and the optimiser's numbers where `resume` finds them, in one step."""
    weights = {name: parameter.detach() for name, parameter in trained.items()}
    partial = folder / f"{CHECKPOINT}.partial"
    torch.save({"state": state, "weights": weights, "optimiser": optimiser.state_dict()}, partial)
    os.replace(partial, folder / CHECKPOINT)


def _save_snapshot(model: Any, run: Run, directory: Path, step: int) -> None:
    with whole_folder(snapshot(directory, run, step)) as partial:
        save(model, run.method, partial)


def _finish(folder: Path, settings: dict[str, Any], state: dict[str, Any], parameters: int) -> dict[str, Any]:
    with (folder / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([_LOG, *state["log"]])
    result = {
        **settings,
        "parameters": parameters,
        "tokens": sum(line[2] for line in state["log"]),
        "seconds": round(sum(line[3] for line in state["log"]), 1),
        "scores": state["scores"],
    }
    write(folder / DONE, json.dumps(result, indent=1).encode())
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return result
