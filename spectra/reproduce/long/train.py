"""One run of the long experiment: it can be killed at any moment, loses less than a minute, and ends with the
weights of a run that was not."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectra.reproduce.base import import_transformers, load_causal
from spectra.reproduce.folders import whole_folder
from spectra.reproduce.long.plan import START, LongPlan, LongRun
from spectra.reproduce.long.sequences import (
    ANSWER_AT,
    KNOWN,
    LENGTH,
    TASKS,
    VOCABULARY,
    base_pairs,
    held_out,
    training_batch,
)
from spectra.reproduce.methods import Method, attach, causal, save
from spectra.reproduce.train import CHECKPOINT, CLIP, DONE, WARM_UP, keep, read_finished, resume
from spectra.results.writing import write

KEEP_EVERY = 30.0  # seconds between points to resume from
_SHOW_EVERY = 5.0  # seconds between notes of how far the run is
PROGRESS = "progress.json"
BASE = "base"
_AT_ONCE = 64  # held-out examples in one pass
_BASE_SEED = 10**6  # of the base's weights and examples: none of the runs' seeds
_BASE_LR = 1e-3
_BASE_WARM_UP = 100


@dataclass(frozen=True)
class Examples:
    """What is trained on and looked at: a batch of tokens for each step, and the held-out ones."""

    batch: Callable[[int], Tensor]
    held_out: Tensor
    per_task: int


def run_folder(directory: Path, name: str) -> Path:
    """Where a run is kept."""
    return directory / "runs" / name


def snapshot(directory: Path, name: str, step: int) -> Path:
    """Where the run's weights after `step` steps are."""
    return run_folder(directory, name) / f"step-{step}"


def losses_of(directory: Path, name: str, step: int) -> Path:
    """Where the held-out losses after `step` steps are; written last, so that its snapshot is whole."""
    return run_folder(directory, name) / f"step-{step}.json"


def base_of(directory: Path, plan: LongPlan) -> Path:
    """The base's folder."""
    return snapshot(directory, BASE, plan.base_steps)


def base_run(plan: LongPlan) -> LongRun:
    """How the base is trained."""
    return LongRun(BASE, Method("full"), _BASE_LR, plan.base_steps)


def train_base(plan: LongPlan, directory: Path) -> None:
    """Train the base from nothing on the 56 known pairs of operations."""
    count = len(TASKS) * plan.per_task
    known = held_out(max(1, plan.held_out // 8), KNOWN)
    examples = Examples(
        lambda step: training_batch(base_pairs(count, _BASE_SEED, step), _BASE_SEED, step),
        known,
        len(known) // len(KNOWN),
    )

    def begin() -> Any:
        transformers = import_transformers()
        torch.manual_seed(_BASE_SEED)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=plan.hidden, intermediate_size=plan.hidden * 8 // 3,
            num_hidden_layers=plan.layers, num_attention_heads=plan.hidden // 32,
            num_key_value_heads=plan.hidden // 32, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    _train(base_run(plan), plan, directory, begin, examples, [plan.base_steps], warm_up=_BASE_WARM_UP)


def train_run(run: LongRun, plan: LongPlan, directory: Path) -> None:
    """Fine-tune the base as the run says; a finished run is left as it is.

    Raises:
        StoreError: the folder holds the same run with other settings.
    """
    examples = Examples(
        lambda step: training_batch(TASKS * plan.per_task, run.data_seed, step),
        held_out(plan.held_out),
        plan.held_out,
    )

    def begin() -> Any:
        model = load_causal(base_of(directory, plan), "cpu")
        torch.manual_seed(run.init_seed)
        model = attach(model, run.method)
        if run.scaling_only:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith("multilora_scaling"))
        return model

    _train(run, plan, directory, begin, examples, plan.snapshots, warm_up=WARM_UP)


def _train(
    run: LongRun,
    plan: LongPlan,
    directory: Path,
    begin: Callable[[], Any],
    examples: Examples,
    snapshots: list[int],
    *,
    warm_up: int,
) -> None:
    folder, settings = run_folder(directory, run.name), _settings(run, plan)
    if read_finished(folder, settings):
        return
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "run.json", json.dumps(settings, indent=1).encode())
    model = begin()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser = _optimiser(run, list(trained.values()))
    state = resume(folder, trained, optimiser)
    state.setdefault("seconds", 0.0)
    kept = shown = time.monotonic()
    if state["step"] == START and START in snapshots:
        _look(model, run, examples, directory, START, 0.0)
    for step in range(state["step"], run.steps):
        start = time.perf_counter()
        rate = run.lr * min(1.0, (step + 1) / warm_up)
        loss = _step(model, optimiser, trained, examples.batch(step), rate, _noise_seed(run, step))
        state["seconds"] += time.perf_counter() - start
        state["log"].append(loss)
        state["step"] = step + 1
        if step + 1 in snapshots:
            _look(model, run, examples, directory, step + 1, state["seconds"])
        now = time.monotonic()
        if now - shown > _SHOW_EVERY:
            shown = now
            _show(folder, state)
        if now - kept > KEEP_EVERY:
            kept = now
            keep(folder, state, trained, optimiser)
    _finish(folder, settings, state, sum(parameter.numel() for parameter in trained.values()))


def _settings(run: LongRun, plan: LongPlan) -> dict[str, Any]:
    return {**asdict(run), "plan": asdict(plan)}


def refuse_other_plan(plan: LongPlan, directory: Path) -> None:
    """Look at every run before the first one takes its time.

    Raises:
        StoreError: a folder holds one of the runs with other settings.
    """
    for run in (base_run(plan), *plan.runs()):
        read_finished(run_folder(directory, run.name), _settings(run, plan))


def _optimiser(run: LongRun, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if run.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=run.lr)
    return torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0, fused=True)


def _noise_seed(run: LongRun, step: int) -> int:
    """Of dropout at one step; the initialisation's seed, since the data's order is not to depend on it."""
    return 1_000_003 * (run.init_seed + 1) + step


def _step(
    model: Any,
    optimiser: torch.optim.Optimizer,
    trained: dict[str, Tensor],
    batch: Tensor,
    rate: float,
    noise_seed: int,
) -> float:
    torch.manual_seed(noise_seed)
    for group in optimiser.param_groups:
        group["lr"] = rate
    model.train()
    loss = answer_losses(model, batch).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def answer_losses(model: Any, batch: Tensor) -> Tensor:
    """(b,): each example's mean negative log-likelihood per answer token, in nats."""
    inner = causal(model)
    hidden = inner.get_decoder()(input_ids=batch[:, :-1], use_cache=False).last_hidden_state[:, ANSWER_AT - 1 :]
    logits = inner.get_output_embeddings()(hidden)
    targets = batch[:, ANSWER_AT:]
    return (
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        .view(targets.shape)
        .mean(1)
    )


def _look(model: Any, run: LongRun, examples: Examples, directory: Path, step: int, seconds: float) -> None:
    """Keep the weights, then the held-out losses task by task."""
    with whole_folder(snapshot(directory, run.name, step)) as partial:
        save(model, run.method, partial)
    model.eval()
    with torch.no_grad():
        losses = torch.cat([answer_losses(model, part) for part in torch.split(examples.held_out, _AT_ONCE)])
    by_task = losses.view(-1, examples.per_task).mean(1).tolist()
    record = {"step": step, "loss": sum(by_task) / len(by_task), "by_task": by_task, "seconds": round(seconds, 1)}
    write(losses_of(directory, run.name, step), json.dumps(record, indent=1).encode())


def _show(folder: Path, state: dict[str, Any]) -> None:
    note = {"step": state["step"], "seconds_per_step": state["seconds"] / state["step"]}
    write(folder / PROGRESS, json.dumps(note).encode())


def _finish(folder: Path, settings: dict[str, Any], state: dict[str, Any], parameters: int) -> None:
    with (folder / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(state["log"], 1)])
    result = {**settings, "parameters": parameters, "seconds": round(state["seconds"], 1)}
    write(folder / DONE, json.dumps(result, indent=1).encode())
    for name in (CHECKPOINT, PROGRESS):
        (folder / name).unlink(missing_ok=True)
