"""All stages in order; what an earlier call finished is not done again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spectra.errors import DeviceError
from spectra.reproduce import figures, numbers
from spectra.reproduce.analysis import decompose, look_further
from spectra.reproduce.base import load_model, prepare_base
from spectra.reproduce.batches import tokenise
from spectra.reproduce.commands import Commands
from spectra.reproduce.cost import measure_costs
from spectra.reproduce.evaluate import evaluate
from spectra.reproduce.page import tables as tables_of
from spectra.reproduce.plan import Plan, Run
from spectra.reproduce.remaining import LOAD, Remaining, work, work_of_cost, work_of_look, work_of_run, work_of_step
from spectra.reproduce.tasks import Example, mix
from spectra.reproduce.train import train
from spectra.reproduce.wordnet import read_wordnet
from spectra.results.writing import write

Say = Callable[[str], None]
_BASE_SCORES = "base-scores.json"
_REPORTS = 6  # lines of progress per run


def reproduce(
    directory: Path,
    plan: Plan,
    *,
    base: Path,
    wordnet: Path,
    pictures: Path,
    device: str = "cpu",
    say: Say = lambda line: None,
) -> None:
    """Train every run of the plan, measure costs, decompose, compare and draw.

    Args:
        directory: keeps models, checkpoints and spectra; the same call with the same plan goes on.
        plan: the runs and their sizes.
        base: a causal language model's folder, or a GGUF file.
        wordnet: folder of the WordNet database.
        pictures: where figures, their numbers and the commands that made them go.
        device: where models are trained.
        say: takes one line of progress at a time.

    Raises:
        NotFoundError: the base or WordNet is not there.
        MissingExtraError: a library of the extra `reproduce` is not installed.
        StoreError: the directory holds runs of another plan.
        DeviceError: there is no such device.

    Reference: Wang et al. 2023 (MultiLoRA), Figs. 1, 3, 4, 5; Liu et al. 2025 (R-LoRA), cost comparison.
    """
    _check_device(device)
    database = read_wordnet(wordnet)
    directory.mkdir(parents=True, exist_ok=True)
    folder = prepare_base(base, directory, plan.layers)
    data = mix(plan.steps * plan.per_task, plan.held_out, database)
    results = [_score_base(folder, data[1], directory, device)]
    left = Remaining(work(plan))
    runs = [*plan.main_runs(), *plan.sensitivity_runs()]
    for place, run in enumerate(runs, 1):
        say(f"run {place} of {len(runs)}: {run.name}, {run.steps} steps{left.said}")
        lines = _Lines(run, plan, left, say)
        results.append(train(run, plan, folder, data, directory, device=device, progress=lines.step))
        lines.close()
    say(f"throughput and memory{left.said}")
    one = work_of_cost(plan)
    costs = measure_costs(folder, plan, data[0], directory, device=device, say=say,
                          done=lambda measured: left.done(one) if measured else left.skip(one))  # fmt: skip
    _report(directory, plan, folder, results, costs, pictures, left, say)


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise DeviceError(f"--device {device} is neither cpu nor cuda[:i]")
    if device != "cpu" and not torch.cuda.is_available():
        raise DeviceError(f"--device {device}: there is no CUDA device here; choose cpu")


def _report(
    directory: Path,
    plan: Plan,
    base: Path,
    results: Sequence[dict[str, Any]],
    costs: list[dict[str, Any]],
    pictures: Path,
    left: Remaining,
    say: Say,
) -> None:
    """Spectra, similarities, figures and tables, all anew from what was trained."""
    import pandas as pd

    say(f"spectra and subspaces{left.said}")
    with Commands(lambda line: say(f"{line}{left.said}")) as commands:
        decompose(directory, base, plan, commands, lambda look: left.done(work_of_look(look, plan)))
        look_further(directory, base, plan, commands)
        say(f"figures and tables{left.said}")
        figures.draw_spectra(directory, plan, pictures, commands)
    figures.draw_costs(costs, pictures / "figure-3")
    tables = {
        "figure-3/cost.csv": pd.DataFrame(costs),
        "spectra.csv": numbers.spectra_table(directory, plan),
        "similarity.csv": numbers.similarity_table(directory, plan),
        "alignment.csv": numbers.alignment_table(directory, plan),
        "heads.csv": numbers.heads_table(directory, plan),
        "series.csv": numbers.series_table(directory, plan),
        "tasks.csv": numbers.task_table(results),
        "runs.csv": numbers.run_table(results),
    }
    for name, table in tables.items():
        write(pictures / name, table.to_csv(index=False, float_format="%.6g").encode())
    values = numbers.values_table(directory, plan)
    values.to_csv(
        pictures / "values.csv.gz", index=False, float_format="%.7g", compression={"method": "gzip", "mtime": 0}
    )
    write(pictures / "tables.md", tables_of(pictures).encode())
    write(pictures / "commands.sh", ("\n".join(commands.lines) + "\n").encode())


def _score_base(folder: Path, held_out: Sequence[Example], directory: Path, device: str) -> dict[str, Any]:
    """Held-out loss and accuracy before any training."""
    kept = directory / _BASE_SCORES
    if not kept.is_file():
        model, tokenizer = load_model(folder, device)
        scores = evaluate(model, tokenise(held_out, tokenizer), device)
        write(kept, json.dumps({"name": "base", "scores": {"0": scores}}, indent=1).encode())
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


class _Lines:
    """Progress of one run: a line now and then, and the steps that are done or were done by an earlier call."""

    def __init__(self, run: Run, plan: Plan, left: Remaining, say: Say) -> None:
        self._run, self._left, self._say = run, left, say
        self._each = work_of_step(plan)
        self._around = work_of_run(run, plan) - run.steps * self._each - LOAD
        self._every = max(1, run.steps // _REPORTS)
        self._at: int | None = None

    def step(self, step: int, loss: float) -> None:
        """One more step is done."""
        if self._at is None:
            self._left.skip((step - 1) * self._each)
            self._left.done(LOAD)
        self._at = step
        self._left.done(self._each)
        if step % self._every == 0:
            self._say(f"  step {step} of {self._run.steps}, loss {loss:.3f}{self._left.said}")

    def close(self) -> None:
        """The run is at its end."""
        if self._at is None:
            self._left.skip(LOAD + self._around + self._run.steps * self._each)
        else:
            self._left.done(self._around)
