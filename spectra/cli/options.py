"""Options that several commands share, and what they mean.

A decorator adds a group of options to a command, and hands the command one object for them:

    @click.command("mine")
    @click.argument("tuned")
    @source_options                    # --layer, --heads, --scale, --split, … → opening
    @compute_options                   # --device, --workers, --cluster, --memory → compute; --calibrate
    def command(tuned: str, opening: Opening, compute: Compute) -> None: ...
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from spectra.deltas.source import Source
    from spectra.files.folder import Folder

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Option = Callable[[Any], Any]
SIZES = ("column", "page", "slide")  # as in spectra.plots, which is not imported to print a help; a test compares


class HeadsType(click.ParamType):
    """mean, sum, each, or the index of a head."""

    name = "heads"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        """The option's value from its text."""
        if isinstance(value, int) or value in ("mean", "sum", "each"):
            return value
        if not re.fullmatch("[0-9]{1,9}", str(value)):
            self.fail(f"{value!r} is not mean, sum, each or the index of a head", param, ctx)
        return int(value)


def tuned_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """TUNED, which may be written as --tuned; the command gets it as `tuned`."""

    @functools.wraps(command)
    def bundled(*, given: str | None, tuned: str | None, **others: Any) -> Any:
        if given is None and tuned is None:
            raise click.UsageError("TUNED is missing: the tuned model or adapter (or --tuned)")
        if given is not None and tuned is not None:
            raise click.UsageError(f"TUNED is given twice, as {given} and as --tuned {tuned}: one run, one update")
        return command(tuned=given if tuned is None else tuned, **others)

    return _apply(
        bundled,
        (
            click.argument("given", metavar="TUNED", required=False, type=click.Path()),
            click.option(
                "--tuned",
                metavar="TUNED",
                type=click.Path(),
                help="TUNED, written as an option: a path, hub id, URL or alias.",
            ),
        ),
    )


def _at_home(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A directory with the user's home in it, where the shell left that to us."""
    place = os.path.expanduser(value) if value is not None else None
    if place is not None and place.startswith("~"):
        raise click.BadParameter(f"{value}: there is no such user (write ./{value} for a folder that is called so)")
    return place


def _no_models_folder(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse to write tables among a model's files, before anything is computed."""
    value = _at_home(ctx, param, value)
    for config in ("config.json", "adapter_config.json", "model_index.json"):
        if value and os.path.isfile(os.path.join(value, config)):
            raise click.BadParameter(f"{value} is a model's folder (it holds {config}): choose another directory")
    return value


layer_option = click.option(
    "--layer", "layers", multiple=True, metavar="PATTERN",
    help="Only these matrices: roles or parts of names (q_proj,v_proj), attn or mlp, layers (0-3, 0-3.q_proj), a glob, "
    "or re:REGEX. Repeatable: what any of them means.",
)  # fmt: skip
download_option = click.option(
    "--download", is_flag=True,
    help="Download what holds the matrices from the hub or a URL into a cache, instead of reading ranges.",
)  # fmt: skip
scale_option = click.option("--scale", type=float, help="The scale s where the adapter does not carry α/r.")
table_option = click.option(
    "--out", type=click.Path(file_okay=False), metavar="DIR", callback=_no_models_folder,
    help="Keep the table here, as csv and as json.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")
_SOURCE = (
    layer_option,
    click.option("--heads", type=HeadsType(), default="mean", show_default=True, metavar="mean|sum|each|N",
                 help="What multi-head adapters stand for."),
    scale_option,
    click.option("--split/--no-split", default=True, show_default=True,
                 help="Report fused projections as their parts."),
    download_option,
)  # fmt: skip
workers_option = click.option(
    "--workers", type=click.IntRange(1, 1024), metavar="N", help="Matrices at work side by side on the CPU.",
)  # fmt: skip
size_option = click.option(
    "--size", type=click.Choice(SIZES), default=SIZES[1], show_default=True,
    help="Figures for a paper's column (3.4 in), its page (7 in) or a slide (13.3 in): panels and text as they fit.",
)  # fmt: skip
_FIGURES = (
    click.option("--figures/--no-figures", default=True, show_default=True,
                 help="Draw figures into the --out directory."),
    size_option,
)  # fmt: skip
_COMPUTE = (
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]",
                 help="Where to compute."),
    workers_option,
    click.option("--cluster", metavar="ADDRESS", help="Address of a Dask scheduler to run on."),
    click.option("--memory", metavar="SIZE", help="Budget for matrices at work, such as 4GiB."
                 "  [default: half of what is free]"),
    click.option("--calibrate/--no-calibrate", default=True, show_default=True, expose_value=False,
                 callback=lambda _context, _option, wanted: _calibrating(wanted),
                 help="Solve by the library that is faster here; measured once, kept in the cache."),
    click.option("--recalibrate", is_flag=True, expose_value=False,
                 callback=lambda _context, _option, wanted: _calibrating(True, again=wanted),
                 help="Measure that once more."),
)  # fmt: skip
_RESULT = (
    click.option("--out", type=click.Path(file_okay=False), metavar="DIR", callback=_at_home,
                 help="Keep tables, arrays and figures here; the same command resumes."),
    *_FIGURES,
    json_option,
)  # fmt: skip


def figures_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--figures, --size; the command gets them as `figures`: the size, or None for no figures."""
    return _apply(_figures_of(command), _FIGURES)


def _figures_of(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def bundled(*, figures: bool, size: str, **others: Any) -> Any:
        return command(figures=size if figures else None, **others)

    return bundled


def within_reach(path: str, download: bool) -> str | Folder:
    """A model that can be opened: with --download, a torch file or what else has no parts to read is fetched whole.

    Args:
        path: a path, hub id, URL or alias.
        download: whether to.

    Returns:
        What is on a server, opened, for `bring`; the path of anything else.
    """
    from spectra.cli.progress import downloading
    from spectra.errors import SourceError
    from spectra.files import hub
    from spectra.files.storage import Place
    from spectra.models.opening import open_model

    place = hub.pinned(path) if download else path
    if isinstance(place, Place):
        try:
            return open_model(place)
        except SourceError:  # such as a torch file; what else it is, the download says
            with downloading(path) as progress:
                return str(hub.resolve(path, fetch=True, progress=progress))
    return path


def bring(models: Iterable[str | None], only: Collection[str]) -> dict[str, str]:
    """Download files of models that were opened where they are: what is read of them is read here from then on.

    Args:
        models: their addresses; what is no address is here.
        only: the addresses of the files.

    Returns:
        The address of each model of which some came → its path on this machine.
    """
    from spectra.cli.progress import downloading
    from spectra.files import hub, remote

    copied = {}
    for model in filter(remote.is_url, dict.fromkeys(filter(None, models))):
        wanted = {address for address in only if f"{address}/".startswith(f"{model}/")}
        if wanted:
            with downloading(model) as progress:
                copied[model] = str(hub.fetched(remote.place_of(model), progress, wanted))
    return copied


def of_one_version(base: str | Folder | None, updates: Sequence[str]) -> str | Folder | None:
    """A base for all of several updates, opened once; that of one update as it is."""
    from spectra.models.opening import open_any

    return open_any(base, as_base=True) if base is not None and len(updates) > 1 else base


def files_of(source: Source, layers: Sequence[str]) -> set[str]:
    """The addresses of the files that hold the chosen matrices; none where the patterns mean nothing."""
    from spectra.errors import SelectionError

    try:
        chosen = source.select(layers) if layers else source
    except SelectionError:
        return set()
    return {part.path for delta in chosen for ref in delta.refs for part in ref.parts}


@dataclass(frozen=True)
class Opening:
    """What a command was told about reading its inputs."""

    layers: tuple[str, ...]
    heads: str | int
    scale: float | None
    split: bool
    download: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `open_source`."""
        return {"heads": self.heads, "scale": self.scale, "split": self.split}

    def open(self, tuned: str, base: str | None) -> Source:
        """The source with the matrices that --layer means; what it left out is said."""
        return self.open_all([tuned], base)[0]

    def open_all(self, updates: Sequence[str], base: str | None) -> list[Source]:
        """Several updates of one base, as `open` gives each."""
        sources = self.opened_all(updates, base)
        return [self.chosen(source) for source in sources]

    def opened_all(self, updates: Sequence[str], base: str | None) -> list[Source]:
        """All of several updates; what is left out of all of them is said once."""
        from spectra.cli import report
        from spectra.deltas.source import NO_HEADS

        shared = of_one_version(self.reached(base, "--base"), updates)
        sources = [self.opened(tuned, shared) for tuned in updates]
        coverages = [source.coverage for source in sources]
        headless = [any(NO_HEADS in line for line in coverage.warnings) for coverage in coverages]
        if not all(headless):  # --heads is for the others: each of their heads is compared with the same weight
            coverages = [
                replace(coverage, warnings=tuple(line for line in coverage.warnings if NO_HEADS not in line))
                for coverage in coverages
            ]
        report.coverage_notes(dict(zip(updates, coverages, strict=True)))
        return sources

    def opened(self, tuned: str, base: str | Folder | None) -> Source:
        """All of it, without a word."""
        from spectra.sources import open_source

        at = self.reached(tuned, "TUNED")
        base = self.reached(base, "--base") if isinstance(base, str) else base
        assert at is not None
        return self.brought(open_source(at, base, **self.settings))

    def reached(self, path: str | None, option: str) -> str | Folder | None:
        """A model that can be opened, as `within_reach`; None where there is none."""
        if path is not None and not path.strip():
            raise click.UsageError(f"{option} is empty: give a path, hub id or alias")
        return None if path is None else within_reach(path, self.download)

    def brought(self, source: Source) -> Source:
        """With --download, the source once the files of its chosen matrices are here; else as it is."""
        from spectra.deltas.copies import at_home

        if not self.download:
            return source
        return at_home(source, bring((source.tuned, source.base), files_of(source, self.layers)))

    def chosen(self, source: Source) -> Source:
        """The matrices that --layer means; those among them that lack the base are said."""
        from spectra.cli import report
        from spectra.deltas.source import SAVED_WHOLE
        from spectra.errors import SelectionError

        lacking = source.lacking(self.layers)
        try:
            found = source.select(self.layers) if self.layers else source
        except SelectionError:
            if lacking:  # a pattern means these alone
                raise SelectionError(f"{source.tuned}: {lacking[0]}: {SAVED_WHOLE}") from None
            raise
        report.lacking(lacking)
        return found


@dataclass(frozen=True)
class Compute:
    """What a command was told about where to compute."""

    device: str
    workers: int | None
    cluster: str | None
    memory: str | None

    @contextmanager
    def keywords(self) -> Iterator[dict[str, Any]]:
        """The keyword arguments of `decompose` and `compare`, while the executor is there."""
        with executor_of(self.workers, self.cluster) as executor:
            yield {"device": self.device, "executor": executor, "memory_budget": self.memory}


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--layer, --heads, --scale, --split, --download; the command gets them as `opening`."""

    @functools.wraps(command)
    def bundled(
        *, layers: tuple[str, ...], heads: str | int, scale: float | None, split: bool, download: bool, **others: Any
    ) -> Any:
        return command(opening=Opening(layers, heads, scale, split, download), **others)

    return _apply(bundled, _SOURCE)


def compute_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--device, --workers, --cluster, --memory; the command gets them as `compute`. Calibration is the library's."""

    @functools.wraps(command)
    def bundled(*, device: str, workers: int | None, cluster: str | None, memory: str | None, **others: Any) -> Any:
        try:
            given = command(compute=Compute(device, workers, cluster, memory), **others)
        except SystemExit:  # some matrices could not be done
            _say_if_unmeasured()
            raise
        _say_if_unmeasured()
        return given

    return _apply(bundled, _COMPUTE)


def _calibrating(wanted: bool, again: bool = False) -> None:
    """The switch is the environment's, which the library and its workers read."""
    if not wanted or again:
        os.environ["SPECTRA_CALIBRATE"] = "again" if again else "0"


def _say_if_unmeasured() -> None:
    """One line where the user wanted the libraries measured and none was."""
    if os.environ.get("SPECTRA_CALIBRATE", "").lower() == "again":
        from spectra.cli import report
        from spectra.engine.solvers.calibration import why_unmeasured

        why = why_unmeasured()
        if why:
            report.note(f"--recalibrate: {why}; nothing was measured")


def result_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--out, --figures, --size, --json; the command gets them as `out`, `figures` (a size, or None) and `as_json`."""
    return _apply(_figures_of(command), _RESULT)


def _apply(command: _Command, options: tuple[_Option, ...]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def executor_of(workers: int | None, cluster: str | None) -> Iterator[Executor | None]:
    """The executor that the options ask for; None to run in this process."""
    if cluster is not None:
        if not cluster.strip():
            raise click.UsageError("--cluster is empty: give the scheduler's address, or leave it out to run here")
        from spectra.engine.executors.dask_cluster import cluster_executor

        with cluster_executor(cluster) as there:
            yield there
    elif workers:
        from spectra.engine.executors.threads import thread_executor

        with thread_executor(workers) as pool:
            yield pool
    else:
        yield None
