"""Two runs at a time, each in a process of one thread; what an earlier call finished is not done again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from spectra.errors import StoreError
from spectra.reproduce.long import figures
from spectra.reproduce.long.numbers import Numbers, gather
from spectra.reproduce.long.page import tables
from spectra.reproduce.long.plan import LongPlan, LongRun
from spectra.reproduce.long.train import PROGRESS, base_run, refuse_other_plan, run_folder, train_base, train_run
from spectra.reproduce.train import DONE
from spectra.results.writing import write

Say = Callable[[str], None]
PROCESSES = 2
_LOCK = "lock"
_FIRST_SAID = 10.0  # seconds after which the time left is told, then less and less often


def reproduce_long(
    directory: Path,
    plan: LongPlan,
    *,
    pictures: Path,
    so_far: bool = False,
    processes: int = PROCESSES,
    say: Say = lambda line: None,
) -> str:
    """Train every run, measure every snapshot, apply the rule, draw.

    Args:
        directory: keeps weights and checkpoints; the same call with the same plan goes on.
        plan: the runs and their sizes.
        pictures: where figures, tables and their numbers go.
        so_far: train nothing and look at what is there.
        processes: runs at a time, each in a process of one thread.
        say: takes one line of progress at a time.

    Returns:
        What the rule says, in Markdown.

    Raises:
        NotFoundError: `so_far`, and there is nothing yet.
        MissingExtraError: a library of the extra `reproduce` is not installed.
        StoreError: the directory holds runs of another plan, or another process trains in it.
    """
    if not so_far:
        train_all(directory, plan, processes=processes, say=say)
    say("spectra and agreement of every snapshot")
    gather(plan, directory, say).save(pictures)
    numbers = Numbers.load(pictures)  # so that whoever has the tables alone comes to the same page
    say("figures and tables")
    figures.draw_all(numbers, pictures)
    text = tables(numbers, plan)
    write(pictures / "tables.md", text.encode())
    return text.partition("### Every run")[0].strip()


def train_all(directory: Path, plan: LongPlan, *, processes: int = PROCESSES, say: Say = lambda line: None) -> None:
    """Train the base, then every run of the plan; the same call with the same plan goes on.

    Raises:
        StoreError: the directory holds runs of another plan, or another process trains in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    refuse_other_plan(plan, directory)
    with alone(directory), _pool(processes) as pool:
        say(f"base, {plan.base_steps} steps")
        _attend([pool.submit(train_base, plan, directory)], [base_run(plan)], directory, say)
        runs = plan.runs()
        say(f"{len(runs)} runs of {plan.steps} steps, {processes} at a time")
        _attend([pool.submit(train_run, run, plan, directory) for run in runs], runs, directory, say)


def steps_done(directory: Path, run: LongRun) -> int:
    """How far a run is, as far as it has noted."""
    folder = run_folder(directory, run.name)
    if (folder / DONE).is_file():
        return run.steps
    note = folder / PROGRESS
    return int(json.loads(note.read_text())["step"]) if note.is_file() else 0


def _attend(futures: list[Future[None]], runs: list[LongRun], directory: Path, say: Say) -> None:
    """Wait for all runs and say now and then how long it will take; the first that fails stops everything."""
    begun, total = time.monotonic(), sum(run.steps for run in runs)
    before = sum(steps_done(directory, run) for run in runs)
    pending, ended, said = set(futures), set[str](), begun
    while pending:
        done, pending = wait(pending, timeout=1.0)
        for future in done:
            if future.exception():
                for other in pending:
                    other.cancel()
            future.result()
            name = runs[futures.index(future)].name
            ended.add(name)
            say(f"  {name} is trained, {len(ended)} of {len(runs)}")
        now = time.monotonic()
        if pending and now - said > max(_FIRST_SAID, (now - begun) / 20):
            said = now
            there = sum(steps_done(directory, run) for run in runs)
            say(f"  {there} of {total} steps, {time_left(total - there, there - before, now - begun)}")


def time_left(left: int, done: int, seconds: float) -> str:
    """At the pace since this call began, which is what a busy machine gives.

    Example:
        >>> time_left(1200, 100, 10.0)
        'about 2 min left'
    """
    if done <= 0:
        return "no step yet"
    minutes = left * seconds / done / 60
    return f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that does not wait for hours of training when something went wrong, or the user has had enough."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """One thread, and no life without the parent: a killed call leaves nothing at work."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        """End this process with its parent."""
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold the directory: the system lets go of a lock when its process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (directory / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(
                f"{directory} is being trained in by another process; wait for it, or choose another --out"
            ) from None
        yield
