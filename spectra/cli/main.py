"""The group of commands, and how an error reaches the user."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import sys
import time
from contextlib import suppress
from typing import Any

import click

from spectra._version import __version__
from spectra.cli import talk
from spectra.cli.elsewhere import here
from spectra.cli.heavy import heavy_imports
from spectra.cli.interrupts import STOPPED, heard, nothing_begun
from spectra.errors import SpectraError

# Command → the module that holds it; imported when it is called or its help is asked for.
_COMMANDS = {
    "svd": "spectra.cli.svd",
    "similarity": "spectra.cli.similarity",
    "alignment": "spectra.cli.alignment",
    "extract": "spectra.cli.extract",
    "interference": "spectra.cli.interference",
    "series": "spectra.cli.series",
    "heads": "spectra.cli.heads",
    "inspect": "spectra.cli.inspect",
    "verify": "spectra.cli.verify",
    "plot": "spectra.cli.plot",
    "report": "spectra.cli.page",
    "reproduce": "spectra.cli.reproduce",
}


_MODELS = ("base", "tuned", "adapter", "merged")  # options that name a model


class _Commands(click.Group):
    """Loads commands lazily and turns the library's errors into one line and exit status 1."""

    def main(self, *given: Any, **named: Any) -> Any:
        """As click's, where stdout may be closed, or full, or a terminal that does not know every letter."""
        _open_streams()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # σ on a latin-1 terminal is no reason to stop
        try:
            with nothing_begun():
                return super().main(*given, **named)
        except OSError as problem:
            if problem.errno != errno.ENOSPC:  # a pipe that is closed is click's affair
                raise
            with suppress(OSError):
                click.echo(f"Error: stdout cannot be written: {problem.strerror}; make room or use a pipe", err=True)
            with suppress(OSError):  # what is left in its buffer would be written, and fail, on the way out
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        with heavy_imports():
            module = importlib.import_module(_COMMANDS[name])
        return talk.add_options(module.command)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's; an option that stands in front of the command is told its place."""
        command = next((word for word in args if word in _COMMANDS), "svd")
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as problem:
            option = problem.option_name
            if problem.possibilities:
                raise
            told = f"No such option {option!r} in front of a command; behind it: spectra {command} … {option}"
            raise click.NoSuchOption(option, message=told, ctx=ctx) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is meant, or what has a similar name; every option that takes one value is given once."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            similar = difflib.get_close_matches(args[0], _COMMANDS, n=3) or [
                name for name in _COMMANDS if name.startswith(args[0])
            ]
            told = f" Did you mean {' or '.join(similar)}?" if similar else f" There are {', '.join(_COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{told}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:  # as a shell that completes words parses
            _look_over(command, name or "", ctx, rest)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        start = time.monotonic()
        # numpy's part here is small matrices, for which OpenBLAS' threads only wait, at full speed, on torch's cores.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        try:
            with heard():
                result = super().invoke(ctx)
            if talk.left_undone(ctx):
                ctx.exit(1)
            return result
        except click.NoSuchOption as problem:
            raise _as_here(problem) from None
        except click.UsageError as problem:
            raise _one_too_many(problem) from None
        except SpectraError as problem:
            raise click.ClickException(str(problem)) from None
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            raise click.exceptions.Exit(STOPPED) from None
        finally:
            if talk.is_verbose():
                click.echo(f"took {time.monotonic() - start:.1f} s", err=True)


def _open_streams() -> None:
    """Let what was closed (`>&-`) lead nowhere: else the next file that is opened would be taken for stdout."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is that stream's
            setattr(sys, name, open(nowhere, mode, encoding="utf-8"))  # noqa: SIM115 - until the process ends


def _as_here(problem: click.NoSuchOption) -> click.NoSuchOption:
    """The same error, with the name that the option has here if other tools call it so."""
    known = [name for option in problem.ctx.command.params for name in option.opts] if problem.ctx else []
    meant = here(problem.option_name, known)
    ctx = problem.ctx
    arguments = [param for param in ctx.command.params if isinstance(param, click.Argument)] if ctx else []
    if meant:
        told = f"No such option {problem.option_name!r}. Did you mean {meant[0]!r}?"
    elif problem.option_name.lstrip("-") in _MODELS and arguments and ctx:
        told = f"No such option {problem.option_name!r}: write {arguments[0].make_metavar(ctx)} without one."
    else:
        return problem
    return click.NoSuchOption(problem.option_name, message=told, ctx=problem.ctx)


def _one_too_many(problem: click.UsageError) -> click.UsageError:
    """The same error; of a word more than the command takes, with what it was probably meant as."""
    ctx = problem.ctx
    found = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", problem.message)
    if ctx is None or found is None:
        return problem
    argument = next((param.name for param in ctx.command.params if isinstance(param, click.Argument)), None)
    more, first = found[1], ctx.params.get(argument or "")
    command, options = ctx.info_name, {name for option in ctx.command.params for name in option.opts}
    if "--adapter" in options:
        told = "its three models are options: --base B --adapter A --merged M"
    elif "--base" in options and not ctx.params.get("base") and " " not in more:
        told = f"the model it started from is an option: --base {more}"
        told += ". Two adapters are compared by spectra similarity" if command == "heads" else ""
    elif "--base" in options:
        told = (
            f"it takes one at a time; of several updates: spectra similarity, interference or series ({first} {more})"
        )
    else:
        told = ""
    return click.UsageError(f"{problem.message}: {told}" if told else problem.message, ctx)


def _look_over(command: click.Command, name: str, parent: click.Context, words: list[str]) -> None:
    """Raise where an option is given twice that takes one value, or where options are missing: all of them at once."""
    with command.context_class(command, info_name=name, parent=parent) as ctx:
        try:
            _, left, order = command.make_parser(ctx).parse_args(list(words))
        except click.UsageError:
            return  # said by the command itself
        given = [item for item in order if isinstance(item, click.Option)]
        _refuse_repeated(name, given)
        if command.get_help_option(ctx) not in given:
            _refuse_missing(command, ctx, given, left)


def _refuse_repeated(name: str, given: list[click.Option]) -> None:
    """Of two models, the last would win in silence."""
    single = [option for option in given if not (option.multiple or option.is_flag)]
    for option in single:
        if single.count(option) > 1:
            flag = max(option.opts, key=len)
            hint = f"run spectra {name} once for each" if option.name in _MODELS else "give the one that counts"
            raise click.UsageError(f"{flag} takes one value and is given {single.count(option)} times: {hint}")


def _refuse_missing(command: click.Command, ctx: click.Context, given: list[click.Option], left: list[str]) -> None:
    """Say the whole line where required options are missing, with the words that were given without them."""
    wanted = [option for option in command.params if isinstance(option, click.Option) and option.required]
    missing = [option for option in wanted if option not in given]
    if not missing:
        return
    takes = any(isinstance(param, click.Argument) for param in command.params)
    words = left if len(left) == len(missing) and not takes else [str(option.metavar) for option in missing]
    line = " ".join(f"{max(option.opts, key=len)} {word}" for option, word in zip(missing, words, strict=True))
    told = f"its models are options: {line}" if words is left else f"missing: {line}"
    raise click.UsageError(told, ctx)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="spectra")
def main() -> None:
    """What did fine-tuning do to the weights?

    Reads base and tuned models or adapters from files, forms the update ΔW, computes its singular
    values and subspaces, and draws them.

    \b
      spectra inspect ckpt/                                       what is in it
      spectra svd ckpt/ --base llama-7b --layer v_proj            singular values of the update
      spectra similarity a/ b/ --top 30                           do two updates agree?
      spectra alignment ckpt/ --base llama-7b                     what it does to W₀'s directions
      spectra extract ckpt/ --base B --rank 16 --out lora/        the update as a LoRA
      spectra verify --base B --adapter A --merged M              is the adapter in the merged model?
      spectra interference a/ b/ c/                               what adding them up does to each
      spectra series --base b ckpt-*/                             the update along training
      spectra heads my-rlora/                                     are an adapter's heads alike?
      spectra plot results/                                       redraw stored results
      spectra report results/ --out page.html                     one page about them, to look at and to send
      spectra reproduce                                           the papers' experiment, end to end
    """
