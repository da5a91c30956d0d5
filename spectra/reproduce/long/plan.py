"""The runs of the long experiment and their sizes: plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from spectra.reproduce.methods import Method

LORA, MULTILORA, FULL_ADAM = "lora", "multilora", "full"
SECOND = "-2"  # what the name of a run's repetition ends in
FAST = "-fast"  # and at three times the common rate
START = 0  # the snapshot before the first step


@dataclass(frozen=True)
class LongRun:
    """One training run.

    Attributes:
        name: its folder.
        method: how the model is adapted.
        lr: learning rate after warm-up, constant.
        steps: optimiser steps.
        init_seed: of the adapter's initialisation and of dropout.
        data_seed: of the training examples and their order.
        optimiser: Adam (no weight decay), or stochastic gradient descent without momentum.
        scaling_only: MultiLoRA whose A and B stay as they started.
    """

    name: str
    method: Method
    lr: float
    steps: int
    init_seed: int = 0
    data_seed: int = 0
    optimiser: Literal["adam", "sgd"] = "adam"
    scaling_only: bool = False

    @property
    def label(self) -> str:
        """How legends and tables call it."""
        details = []
        if self.method.kind == "full":
            details.append("SGD" if self.optimiser == "sgd" else "Adam")
        if self.scaling_only:
            details.append("scaling alone")
        details.append(f"rate {self.lr:g}")
        if self.name.endswith(SECOND):
            details.append("again")
        return f"{self.method.label}, {', '.join(details)}"


@dataclass(frozen=True)
class LongPlan:
    """The whole experiment.

    Attributes:
        base_steps: steps of training the base from nothing.
        steps: of each run.
        first: the first snapshot after the start; every other one has twice the steps of the one before.
        r: rank of one MultiLoRA module; LoRA and R-LoRA have n·r.
        n: MultiLoRA's modules, R-LoRA's heads.
        per_task: examples of each of the eight tasks in a batch.
        held_out: held-out examples of each task.
        hidden: the model's width.
        layers: its number of blocks.
    """

    base_steps: int = 3000
    steps: int = 6400
    first: int = 50
    r: int = 4
    n: int = 3
    per_task: int = 2
    held_out: int = 64
    hidden: int = 192
    layers: int = 4

    @property
    def snapshots(self) -> list[int]:
        """Steps at which a run is kept: 0, then 50·2ⁱ, and the last one.

        Example:
            >>> LongPlan().snapshots
            [0, 50, 100, 200, 400, 800, 1600, 3200, 6400]
        """
        steps, step = [START], self.first
        while step < self.steps:
            steps.append(step)
            step *= 2
        return [*steps, self.steps]

    def runs(self) -> list[LongRun]:
        """All runs, those that the decision rule needs first."""
        rank = self.n * self.r
        lora = LongRun(LORA, Method("lora", rank), 1e-3, self.steps)
        multi = LongRun(MULTILORA, Method("multilora", self.r, self.n), 1e-3, self.steps)
        full = LongRun(FULL_ADAM, Method("full"), 3e-4, self.steps)
        rlora = LongRun("rlora", Method("rlora", rank, self.n), 1e-3, self.steps)
        return [
            lora,
            multi,
            full,
            *(replace(run, name=run.name + FAST, lr=3e-3) for run in (multi, lora)),
            *(replace(run, name=run.name + SECOND, init_seed=1, data_seed=1) for run in (multi, lora, full)),
            replace(multi, name="multilora-scaling", scaling_only=True),
            rlora,
            replace(full, name="full-sgd", lr=0.1, optimiser="sgd"),
            replace(rlora, name="rlora" + SECOND, init_seed=1, data_seed=1),
        ]


LONG = LongPlan()
QUICK_LONG = LongPlan(base_steps=40, steps=40, first=10, held_out=8)
