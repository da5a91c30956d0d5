"""Memory against the plan: no command takes more than --memory says, beyond what it takes for next to nothing."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from support.checkpoints import write_adapter, write_checkpoint

from campaign import children, judges
from campaign.case import Area, Case, HarmError
from campaign.commands import TIME, spectra_command

# Bytes beyond plan and baseline, for each thread: freed blocks that are kept for the next matrix (`keep_freed_memory`).
SLACK = 64 * 2**20
_BUDGETS = (48, 96, 160)  # MiB


class Planned(Area):
    """Models of random shapes under a random budget."""

    name = "memory"
    share = 1.0
    seconds = 4 * TIME

    def kinds(self) -> tuple[str, ...]:
        return ("svd", "svd-values", "svd-workers", "lora", "similarity", "alignment", "extract", "many")

    def run(self, case: Case, home: Path) -> str:
        rng, budget = case.rng, case.rng.choice(_BUDGETS) * 2**20
        shapes = [_shape(rng, budget) for _ in range(rng.randint(2, 4) if case.kind != "many" else 40)]
        base = self._peak(case.kind, home / "small", [(8, 8)] * 2, budget, rng)
        peak = self._peak(case.kind, home / "large", shapes, budget, rng)
        slack = SLACK * (2 if case.kind == "svd-workers" else 1)
        parts = " + ".join(f"{size / 2**20:.0f}" for size in (budget, base, slack))
        said = f"{peak / 2**20:.0f} MiB of {parts}, {shapes[:4]}"
        if peak > base + budget + slack:
            raise HarmError(f"took {said}")
        print(said)
        return "within the budget" if peak <= base + budget else "within the slack"

    def _peak(self, kind: str, home: Path, shapes: list[tuple[int, int]], budget: int, rng: random.Random) -> int:
        """Bytes that the command takes at most, for matrices of these shapes."""
        home.mkdir()
        words = _models(kind, home, shapes, rng.choice([torch.float32, torch.bfloat16]))
        words += ["--memory", f"{budget // 2**20}MiB", "--json"]
        ended = children.call(spectra_command(words), home, seconds=TIME)
        judges.one_message(ended, f"{words[0]} of {shapes[:4]}")
        return ended.peak


def _shape(rng: random.Random, budget: int) -> tuple[int, int]:
    """A shape of which ΔW takes up to a seventh of the budget in float64; what it needs may be more than all of it."""
    entries = rng.uniform(0.002, 0.15) * budget / 8
    ratio = rng.choice([1, 1, 2, 4, 16])
    short = max(8, int((entries / ratio) ** 0.5))
    return (short, short * ratio) if rng.random() < 0.5 else (short * ratio, short)


def _models(kind: str, home: Path, shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[str]:
    """Write what the command reads; the command."""
    torch.manual_seed(0)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(len(shapes))]
    if kind == "lora":
        tensors = {}
        for name, (m, n) in zip(names, shapes, strict=True):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rank = min(16, m, n)
            tensors |= {
                f"{module}.lora_A.weight": torch.randn(rank, n),
                f"{module}.lora_B.weight": torch.randn(m, rank),
            }
        config = {"peft_type": "LORA", "r": min(16, *map(min, shapes)), "lora_alpha": 16}
        write_adapter(home / "a", tensors, config)
        return ["svd", "a", "--top", "8"]
    for place in ("base", "a", "b") if kind == "similarity" else ("base", "a"):
        write_checkpoint(
            home / place, {name: torch.randn(shape).to(dtype) for name, shape in zip(names, shapes, strict=True)}
        )
    return {
        "svd": ["svd", "a", "--base", "base", "--top", "8"],
        "svd-values": ["svd", "a", "--base", "base"],
        "svd-workers": ["svd", "a", "--base", "base", "--top", "8", "--workers", "2"],
        "many": ["svd", "a", "--base", "base", "--top", "4"],
        "similarity": ["similarity", "a", "b", "--base", "base", "--top", "8"],
        "alignment": ["alignment", "a", "--base", "base", "--k", "4"],
        "extract": ["extract", "a", "--base", "base", "--rank", "8", "--out", "lora"],
    }[kind]
