"""`spectra reproduce long`: does MultiLoRA's flat spectrum survive training?"""

from __future__ import annotations

from pathlib import Path

import click

from spectra.cli import report


@click.command("long", short_help="Train a small model for long: is MultiLoRA's flat spectrum its random start?")
@click.option(
    "--out",
    default=".demo/long-training",
    show_default=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Weights and checkpoints; the same command resumes.",
)
@click.option(
    "--figures",
    "pictures",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Figures, tables and their numbers.  [default: OUT/figures]",
)
@click.option("--quick", is_flag=True, help="A few steps of everything, in about a minute.")
@click.option("--so-far", is_flag=True, help="Train nothing; look at the snapshots that are there.")
@click.option(
    "--processes", default=2, show_default=True, type=click.IntRange(min=1), help="Runs at a time, one thread each."
)
def command(out: Path, pictures: Path | None, quick: bool, so_far: bool, processes: int) -> None:
    """Twelve runs of 6,400 steps on a model of 1.8 million parameters, and a rule that decides.

    LoRA, MultiLoRA, R-LoRA and full fine-tuning on eight synthetic tasks, most of them twice. Snapshots along
    training say what the spectrum of ΔW becomes once A and B have left their random start. About an hour on two
    idle cores. Killed at any moment, the same command goes on and loses less than a minute of each run.
    """
    from spectra.reproduce.long import LONG, QUICK_LONG, reproduce_long

    pictures = pictures or out / "figures"
    plan = QUICK_LONG if quick else LONG
    said = reproduce_long(out, plan, pictures=pictures, so_far=so_far, processes=processes, say=report.note)
    click.echo(said)
    click.echo(pictures)
