"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


class HeadsType(click.ParamType):
    """mean, sum, each, or the index of a head."""

    name = "heads"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        """The option's value from its text."""
        if isinstance(value, int) or value in ("mean", "sum", "each"):
            return value
        if not str(value).isdigit():
            self.fail(f"{value!r} is not mean, sum, each or the index of a head", param, ctx)
        return int(value)


_LAYER = click.option(
    "--layer", "layers", multiple=True, metavar="PATTERN",
    help="Only these matrices: a role or path component (v_proj), a glob, or re:REGEX. Repeatable.",
)  # fmt: skip
_SOURCE = (
    click.option("--heads", type=HeadsType(), default="mean", show_default=True, metavar="mean|sum|each|N",
                 help="What multi-head adapters stand for."),
    click.option("--scale", type=float, help="The scale s where the adapter does not carry α/r."),
    click.option("--split/--no-split", default=True, show_default=True,
                 help="Report fused projections as their parts."),
)  # fmt: skip
_COMPUTE = (
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]",
                 help="Where to compute."),
    click.option("--workers", type=click.IntRange(min=1), metavar="N",
                 help="Matrices at work side by side on the CPU."),
    click.option("--cluster", metavar="ADDRESS", help="Address of a Dask scheduler to run on."),
    click.option("--memory", metavar="SIZE", help="Budget for matrices at work, such as 4GiB."
                 "  [default: half of what is free]"),
)  # fmt: skip
_OUT = click.option(
    "--out", type=click.Path(file_okay=False), metavar="DIR",
    help="Keep tables, arrays and figures here; the same command resumes.",
)  # fmt: skip
_FIGURES = click.option(
    "--figures/--no-figures", default=True, show_default=True, help="Draw figures into the --out directory."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")


def source_options(command: _Command) -> _Command:
    """--layer, --heads, --scale, --split."""
    return _apply(command, (_LAYER, *_SOURCE))


def compute_options(command: _Command) -> _Command:
    """--device, --workers, --cluster, --memory."""
    return _apply(command, _COMPUTE)


def result_options(command: _Command) -> _Command:
    """--out, --figures, --json."""
    return _apply(command, (_OUT, _FIGURES, _JSON))


def _apply(command: _Command, options: tuple[Callable[[Any], Any], ...]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def executor_for(workers: int | None, cluster: str | None) -> Iterator[Executor | None]:
    """The executor that the options ask for; None to run in this process."""
    if cluster:
        from spectra.engine.executors.dask_cluster import cluster_executor

        with cluster_executor(cluster) as there:
            yield there
    elif workers:
        from spectra.engine.executors.threads import thread_executor

        with thread_executor(workers) as pool:
            yield pool
    else:
        yield None
