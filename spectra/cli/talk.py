"""How much a command says: -q for results, warnings and errors only, -v for every name and how long it took."""

from __future__ import annotations

import click

from spectra.printing import printed_lines

_KEY = "spectra.talk"
_UNDONE = "spectra.undone"


def is_quiet() -> bool:
    """Whether the command that runs was given -q."""
    return _given() == "quiet"


def is_verbose() -> bool:
    """Whether the command that runs was given -v."""
    return _given() == "verbose"


def leave_undone() -> None:
    """Let the command that runs end with status 1 when it is through: something that was asked for is not there."""
    context = click.get_current_context(silent=True)
    if context:
        context.meta[_UNDONE] = True


def left_undone(context: click.Context) -> bool:
    """Whether something that was asked for is not there."""
    return bool(context.meta.get(_UNDONE))


def say(text: object = "", *, err: bool = False) -> None:
    """Lines to stdout or stderr: the one way to the terminal for what may have names in it."""
    click.echo(printed_lines(text), err=err)


def add_options(command: click.Command) -> click.Command:
    """Give a command -v and -q, once."""
    there = {parameter.name for parameter in command.params}
    command.params += [option for option in _OPTIONS if option.name not in there]
    return command


def _given() -> str:
    context = click.get_current_context(silent=True)
    return str(context.meta.get(_KEY, "")) if context else ""


def _note(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given and context.meta.setdefault(_KEY, option.name) != option.name:
        raise click.UsageError("-v and -q are opposites: give one of them")


_OPTIONS = [
    click.Option(
        ["-v", "--verbose"], is_flag=True, expose_value=False, callback=_note,
        help="Name all that was not used, and say how long it took.",
    ),
    click.Option(
        ["-q", "--quiet"], is_flag=True, expose_value=False, callback=_note,
        help="Results, warnings and errors only: no progress, no notes.",
    ),
]  # fmt: skip
