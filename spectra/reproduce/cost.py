"""Training throughput and peak memory against total rank, each point measured in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spectra.errors import SpectraError
from spectra.reproduce.base import load_model
from spectra.reproduce.batches import Tokens, answer_logits, example_losses, pack, tokenise
from spectra.reproduce.methods import Method, attach, causal
from spectra.reproduce.plan import Plan
from spectra.reproduce.tasks import Example
from spectra.results.writing import write

TOKENS = 512  # of one row; Wang et al. 2023 use 1024
_COSTS = "costs.json"


def points(plan: Plan) -> list[Method]:
    """What is measured: LoRA and MultiLoRA of equal total rank, R-LoRA and multi-head LoRA of equal heads, full."""
    pairs = [(Method("lora", n * plan.r), Method("multilora", plan.r, n)) for n in plan.cost_ranks]
    heads = [(Method("rlora", plan.r, n), Method("multihead", plan.r, n)) for n in plan.cost_ranks if n > 1]
    return [method for pair in pairs + heads for method in pair] + [Method("full")]


def measure_costs(
    base: Path,
    plan: Plan,
    examples: Sequence[Example],
    directory: Path,
    *,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    done: Callable[[bool], None] = lambda measured: None,
) -> list[dict[str, Any]]:
    """One row per method: tokens per second and peak MiB of training; points that are measured already are kept.

    `done` is told after each point whether it was measured now.

    Reference: Wang et al. 2023, Fig. 3.
    """
    kept = directory / _COSTS
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else []
    there = {row["label"] for row in rows}
    row_of = _one_row(examples)
    with _fresh_processes() as pool:
        for method in points(plan):
            if method.label in there:
                done(False)
                continue
            try:
                costs = pool.submit(measure, base, method, row_of, plan.cost_steps, device).result()
            except RuntimeError as problem:  # torch's own, or a process that was ended
                raise SpectraError(f"measuring {method.label} failed: {problem}") from None
            rows.append({"label": method.label, "kind": method.kind, "n": method.n, "r": method.r, **costs})
            write(kept, json.dumps(rows, indent=1).encode())
            done(True)
            say(f"  {method.label}: {costs['tokens_per_second']:.0f} tokens/s, {costs['peak_mib']:.0f} MiB")
    return rows


def _one_row(examples: Sequence[Example]) -> list[Example]:
    """Examples of about TOKENS tokens, at four characters a token; the exact number is in the result."""
    kept, size = [], 0
    for example in examples[:: max(1, len(examples) // 97)]:
        kept.append(example)
        size += len(example.question + example.answer) // 4 + 3
        if size >= TOKENS:
            break
    return kept


@contextmanager
def _fresh_processes() -> Iterator[Executor]:
    """A new process for every point, so that the peak of memory is its own; all begin with the libraries loaded."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["spectra.reproduce.cost", "transformers.modeling_utils", "peft"])
    else:
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool


def measure(base: Path, method: Method, examples: Sequence[Example], steps: int, device: str) -> dict[str, Any]:
    """Train a few steps on one row and look at the clock and the memory; the first step is not counted."""
    torch.manual_seed(0)
    model, tokenizer = load_model(base, device)
    model = attach(model, method).train()
    row: list[Tokens] = tokenise(examples, tokenizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = pack(row, device)
    _forget_peak(device)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        example_losses(answer_logits(causal(model), batch), batch).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "tokens": batch.ids.numel(),
        "tokens_per_second": batch.ids.numel() / statistics.median(seconds[1:]),
        "peak_mib": _peak_mib(device),
        "parameters": sum(parameter.numel() for parameter in trained),
    }


def _forget_peak(device: str) -> None:
    """What loading needed does not count, where the system can forget it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
