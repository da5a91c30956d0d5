"""Spectra and similarities of the trained models, made by the toolkit's own commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spectra.reproduce.commands import Commands
from spectra.reproduce.origin import origin_of, save_origin
from spectra.reproduce.plan import REFERENCE, SECOND_SEED, Plan, Run
from spectra.reproduce.train import snapshot

TOP = 30
ALL = ("re:.*_proj.weight",)
ATTENTION = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Look:
    """One trained model at one step, and where its spectra are.

    Attributes:
        run: what was trained.
        step: after how many steps.
        layers: patterns of the matrices that are decomposed.
        origin: instead of the trained update, what MultiLoRA's random start and trained scaling alone give.
    """

    run: Run
    step: int
    layers: tuple[str, ...]
    origin: bool = False

    @property
    def name(self) -> str:
        """`lora-step-160`."""
        return f"{self.run.name}-step-{self.step}" + ("-origin" if self.origin else "")


def looks(plan: Plan) -> list[Look]:
    """Every main run at its end in full; every run at the early step, and MultiLoRA's origins, in key and value."""
    main, further = plan.main_runs(), plan.sensitivity_runs()
    origins = [Look(run, plan.steps, ATTENTION, origin=True) for run in main if run.method.kind == "multilora"]
    early = [Look(run, plan.early, ATTENTION) for run in (main if plan.early < plan.steps else []) + further]
    longer = [Look(run, plan.steps, ATTENTION) for run in further if run.steps == plan.steps]
    return [Look(run, plan.steps, ALL) for run in main] + longer + origins + early


def pairs(plan: Plan) -> list[tuple[Look, Look]]:
    """What is compared: every look to full fine-tuning at the same step; second seeds and origins to their run."""
    there = {look.name: look for look in looks(plan)}
    pairs_of_looks = []
    for look in there.values():
        itself = set() if look.origin else {look.run.name}
        partners = {REFERENCE, look.run.name.removesuffix(SECOND_SEED)} - itself
        pairs_of_looks += [(look, there[f"{name}-step-{look.step}"]) for name in sorted(partners)]
    return pairs_of_looks


def decompose(
    directory: Path,
    base: Path,
    plan: Plan,
    commands: Commands,
    done: Callable[[Look | None], None] = lambda look: None,
) -> None:
    """`spectra svd` of every look and `spectra similarity` of it to its partners, on both sides.

    `done` is told after each look of the look, and of None after each comparison.
    """
    for look in looks(plan):
        commands.say(f"  {look.name}")
        if look.origin:
            save_origin(look.run, look.step, base, directory)
        tuned = (origin_of if look.origin else snapshot)(directory, look.run, look.step)
        layers = [word for pattern in look.layers for word in ("--layer", pattern)]
        commands.run("svd", "--base", base, "--tuned", tuned, *layers,
                     "--top", str(TOP), "--no-figures", "--out", spectra_of(directory, look))  # fmt: skip
        done(look)
    for look, partner in pairs(plan):
        commands.run("similarity", spectra_of(directory, look), spectra_of(directory, partner),
                     "--top", str(TOP), "--side", "both", "--no-figures",
                     "--out", similarity_of(directory, look, partner))  # fmt: skip
        done(None)


def look_further(directory: Path, base: Path, plan: Plan, commands: Commands) -> None:
    """Of every main run's key and value: `spectra alignment` at the end, `spectra heads`, `spectra series`."""
    layers = [word for role in ATTENTION for word in ("--layer", role)]
    for run in plan.main_runs():
        tuned = snapshot(directory, run, plan.steps)
        commands.run("alignment", "--base", base, "--tuned", tuned, *layers, "--cache", directory / "base-vectors",
                     "--no-figures", "--out", alignment_of(directory, run))  # fmt: skip
        if run.method.n > 1:
            commands.run("heads", tuned, "--base", base, *layers, "--no-figures", "--out", heads_of(directory, run))
        steps = sorted({plan.early, plan.steps})
        commands.run("series", *(snapshot(directory, run, step) for step in steps), "--base", base, *layers,
                     "--no-figures", "--out", series_of(directory, run))  # fmt: skip


def alignment_of(directory: Path, run: Run) -> Path:
    """The results directory of a run against its base."""
    return directory / "alignment" / run.name


def heads_of(directory: Path, run: Run) -> Path:
    """The results directory of a run's heads, or parallel modules."""
    return directory / "heads" / run.name


def series_of(directory: Path, run: Run) -> Path:
    """The results directory of a run from step to step."""
    return directory / "series" / run.name


def spectra_of(directory: Path, look: Look) -> Path:
    """The results directory of a look's spectra."""
    return directory / "spectra" / look.name


def similarity_of(directory: Path, look: Look, partner: Look) -> Path:
    """The results directory of a comparison."""
    return directory / "similarity" / f"{look.name}-to-{partner.run.name}"
