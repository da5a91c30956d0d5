"""Which runs are made, with which settings: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from spectra.reproduce.methods import Method

REFERENCE = "full"  # what the others are compared to
SECOND_SEED = "-seed1"  # what the name of a run with another seed ends in
MULTILORA = "multilora-n3"
YARDSTICK = REFERENCE + SECOND_SEED  # full fine-tuning again, with its data in another order


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: its folder.
        method: how the model is adapted.
        lr: learning rate after warm-up, constant.
        steps: number of optimiser steps.
        seed: of the data's order, of the adapter's initialisation and of dropout.
    """

    name: str
    method: Method
    lr: float
    steps: int
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The whole experiment.

    Attributes:
        steps: of each main run.
        early: step at which main runs are looked at as well, unless it is the last one, and the length of the
            sensitivity runs.
        per_task: examples of each task in a batch.
        held_out: held-out examples of each task.
        r: rank of one MultiLoRA module.
        lrs: learning rate of full fine-tuning and of adapters.
        checkpoint_every: steps between points to resume from.
        cost_ranks: multiples n of r at which throughput and memory are measured.
        cost_steps: steps of each such measurement, after one that is not counted.
        sensitivity: whether other seeds and learning rates are run, too.
        layers: of the base, the first so many; None for all.
    """

    steps: int = 160
    early: int = 40
    per_task: int = 1
    held_out: int = 24
    r: int = 12
    lrs: dict[str, float] = field(default_factory=lambda: {"full": 1e-4, "adapter": 1e-3})
    checkpoint_every: int = 40
    cost_ranks: tuple[int, ...] = (1, 2, 3, 5, 8)
    cost_steps: int = 4
    sensitivity: bool = True
    layers: int | None = None

    def main_runs(self) -> list[Run]:
        """The six runs of the figures, at equal data and steps."""
        lora, multi, rlora = self.adapters()
        full = Run(REFERENCE, Method("full"), self.lrs["full"], self.steps)
        adapter = self.lrs["adapter"]
        return [
            full,
            replace(full, name=YARDSTICK, seed=1),
            Run("lora", lora, adapter, self.steps),
            Run(MULTILORA, multi, adapter, self.steps),
            Run("multilora-n5", replace(multi, n=5), adapter, self.steps),
            Run("rlora", rlora, adapter, self.steps),
        ]

    def adapters(self) -> tuple[Method, Method, Method]:
        """LoRA, MultiLoRA with n = 3 and R-LoRA of one total rank, 3·r."""
        return Method("lora", 3 * self.r), Method("multilora", self.r, 3), Method("rlora", 3 * self.r, 3)

    def sensitivity_runs(self) -> list[Run]:
        """A third and three times the learning rate for full fine-tuning, LoRA and MultiLoRA, and other seeds.

        They stop at the early step, all but MultiLoRA at the high rate: its scaling starts at zero, and at the
        rate that suits LoRA it has not caught up by then.
        """
        if not self.sensitivity:
            return []
        chosen = {run.name: replace(run, steps=self.early) for run in self.main_runs()}
        runs = []
        for name in (REFERENCE, "lora", MULTILORA):
            runs += [replace(chosen[name], name=f"{name}-lr{sign}", lr=chosen[name].lr * factor)
                     for sign, factor in (("-low", 1 / 3), ("-high", 3.0))]  # fmt: skip
        runs[-1] = replace(runs[-1], steps=self.steps)
        return runs + [replace(chosen[name], name=name + SECOND_SEED, seed=1) for name in ("lora", MULTILORA)]


FULL = Plan()
QUICK = Plan(
    steps=4, early=4, held_out=2, r=4, checkpoint_every=2, cost_ranks=(1, 3), cost_steps=1, sensitivity=False, layers=4
)
