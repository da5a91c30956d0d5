"""Processes that begin with their libraries imported: forked from one that did nothing else.

A test that needs a process of its own, to kill it, to break its library or to see what it prints, pays for the imports
once instead of each time. Not for a test of what happens while something is imported.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TESTS = Path(__file__).resolve().parents[1]


@dataclass
class Process:
    """One that was forked; what it writes is in two files.

    Attributes:
        pid: its number.
        out: the file of its stdout.
        err: the file of its stderr.
    """

    pid: int
    out: Path
    err: Path
    _parent: Warm
    _status: int | None = None

    def kill(self) -> None:
        """End it without asking."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has been waited for."""
        if self._status is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Until it has ended; its exit status, or minus the signal that ended it."""
        if self._status is None:
            self._status = int(self._parent.asked({"wait": self.pid}))
        return self._status


class Warm:
    """A context: the process that others are forked from, with these modules imported, and what that printed."""

    def __init__(self, *modules: str) -> None:
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end of this context
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from support.warm import serve; exec(serve())", *modules],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()
        self._said.close()

    @property
    def said(self) -> str:
        """What the imports wrote to stderr."""
        return os.pread(self._said.fileno(), 2**20, 0).decode()

    def start(
        self,
        code: str,
        words: Sequence[str | Path] = (),
        *,
        into: Path,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Run code as `python -c code words…` would here, in this or a given environment.

        Args:
            code: Python.
            words: what follows in sys.argv.
            into: the name of the files of its output, without their suffixes; they grow if they are there.
            environment: all of it; None for this process's.
        """
        out, err = into.with_suffix(".out"), into.with_suffix(".err")
        for file in (out, err):
            file.touch()
        asked = {
            "code": code, "words": [str(word) for word in words], "out": str(out), "err": str(err),
            "environment": dict(os.environ if environment is None else environment), "cwd": str(Path.cwd()),
        }  # fmt: skip
        return Process(int(self.asked(asked)), out, err, self)

    def run(self, code: str, words: Sequence[str | Path] = (), **more: Any) -> subprocess.CompletedProcess[str]:
        """As `start`, to the end, and what it printed."""
        process = self.start(code, words, **more)
        status = process.wait()
        return subprocess.CompletedProcess([], status, process.out.read_text(), process.err.read_text())

    def asked(self, words: dict[str, Any]) -> str:
        """What the process answers to a line."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the process that others are forked from has ended: {self.said}"
        return answer


def serve() -> str:
    """Import what the command line names, then fork for every line of stdin.

    Returns:
        In a child, the code that it is to run; in the server, once stdin has ended, nothing.
    """
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # children neither look through what was imported nor copy its pages for that
    children = set[int]()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            children.discard(asked["wait"])
            answer = os.waitstatus_to_exitcode(status)
        elif (answer := os.fork()) == 0:
            _move_in(asked)
            return str(asked["code"])
        else:
            children.add(answer)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return ""


def _move_in(asked: dict[str, Any]) -> None:
    """Make a child what it would be if it had been started by itself."""
    writing = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, asked["out"], writing), (2, asked["err"], writing)):
        file = os.open(name, mode)
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[1:] = asked["words"]
