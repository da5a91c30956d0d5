"""The group of commands, and how an error reaches the user."""

from __future__ import annotations

import importlib
from typing import Any

import click

from spectra._version import __version__
from spectra.errors import SpectraError

# Command → the module that holds it; imported when it is called or its help is asked for.
_COMMANDS = {
    "svd": "spectra.cli.svd",
    "similarity": "spectra.cli.similarity",
    "alignment": "spectra.cli.alignment",
    "extract": "spectra.cli.extract",
    "interference": "spectra.cli.interference",
    "series": "spectra.cli.series",
    "inspect": "spectra.cli.inspect",
    "verify": "spectra.cli.verify",
    "plot": "spectra.cli.plot",
    "reproduce": "spectra.cli.reproduce",
}


class _Commands(click.Group):
    """Loads commands lazily and turns the library's errors into one line and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[name]).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpectraError as problem:
            raise click.ClickException(str(problem)) from None


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="spectra")
def main() -> None:
    """What did fine-tuning do to the weights?

    Reads base and tuned models or adapters from files, forms the update ΔW, computes its singular
    values and subspaces, and draws them.

    \b
      spectra inspect ckpt/                                       what is in it
      spectra svd --base llama-7b --tuned ckpt/ --layer v_proj    singular values of the update
      spectra similarity a/ b/ --top 30                           do two updates agree?
      spectra alignment --base llama-7b --tuned ckpt/             what it does to W₀'s directions
      spectra extract --tuned ckpt/ --base b --rank 16 --out l/   the update as a LoRA
      spectra verify --base B --adapter A --merged M              is the adapter in the merged model?
      spectra interference a/ b/ c/                               what adding them up does to each
      spectra series --base b ckpt-*/                             the update along training
      spectra plot results/                                       redraw stored results
      spectra reproduce                                           the papers' experiment, end to end
    """
