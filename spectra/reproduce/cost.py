"""Training throughput and peak memory against total rank, each point measured in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spectra.errors import SpectraError
from spectra.reproduce.base import load_model
from spectra.reproduce.batches import Tokens, answer_logits, example_losses, pack, tokenise
from spectra.reproduce.methods import Method, attach, causal
from spectra.reproduce.plan import Plan
from spectra.reproduce.tasks import Example
from spectra.results.shelf import write

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
    for method in points(plan):
        if method.label in there:
            done(False)
            continue
        request = {"base": str(base), "method": asdict(method), "steps": plan.cost_steps, "device": device}
        found = _in_process({**request, "examples": [asdict(example) for example in row_of]})
        rows.append({"label": method.label, "kind": method.kind, "n": method.n, "r": method.r, **found})
        write(kept, json.dumps(rows, indent=1).encode())
        done(True)
        say(f"  {method.label}: {found['tokens_per_second']:.0f} tokens/s, {found['peak_mib']:.0f} MiB")
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


def _in_process(request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "spectra.reproduce.cost"], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SpectraError(f"measuring {request['method']} failed: {last[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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


def _main() -> None:
    request = json.load(sys.stdin)
    examples = [Example(**item) for item in request["examples"]]
    found = measure(Path(request["base"]), Method(**request["method"]), examples, request["steps"], request["device"])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    _main()
