"""A real Dask scheduler and real workers as processes of this machine, also such as are not as they should be."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from support.warm import TESTS, Process, Warm

MAIN = "from distributed.cli.dask_{what} import main; main()"


class Cluster:
    """A scheduler, and the workers that were started for it.

    Attributes:
        folder: where its files lie.
        warm: what its processes are forked from; nothing of spectra is imported there.
        address: of the scheduler.
        scheduler: its process.
        workers: theirs.
    """

    def __init__(self, folder: Path, warm: Warm, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.warm = warm
        file = folder / "scheduler.json"
        words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file), *options]
        self.scheduler = self._start("scheduler", words)
        until = time.monotonic() + 60
        while not file.is_file() and time.monotonic() < until:
            time.sleep(0.05)
        self.address = json.loads(file.read_text())["address"]
        self.workers: list[Process] = []

    def worker(self, *options: str, before: str = "") -> Process:
        """Start a worker of one thread; `before` is what its Python does first."""
        words = [self.address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder)]
        words += [] if "--nworkers" in options else ["--no-nanny"]
        words += [] if "--memory-limit" in options else ["--memory-limit", "1GiB"]
        self.workers.append(self._start("worker", [*words, *options], before))
        return self.workers[-1]

    @property
    def environment(self) -> dict[str, str]:
        """In which its processes run."""
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        reach = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}  # of servers on this machine
        return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | reach

    def _start(self, what: str, words: Sequence[str], before: str = "") -> Process:
        code, into = f"{before}\n{MAIN.format(what=what)}", self.folder / what
        return self.warm.start(code, words, into=into, environment=self.environment)

    def stop(self) -> None:
        """Kill whatever is left."""
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@contextmanager
def dask_cluster(folder: Path, options: Sequence[str] = (), warm: Warm | None = None) -> Iterator[Cluster]:
    """A scheduler while the block runs; its processes are forked from `warm`, or from one of its own."""
    modules = ("torch", "distributed", "distributed.cli.dask_scheduler", "distributed.cli.dask_worker")
    with nullcontext(warm) if warm else Warm(*modules) as parent:
        cluster = Cluster(folder, parent, options)
        try:
            yield cluster
        finally:
            cluster.stop()
