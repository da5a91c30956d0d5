"""The toolkit's own commands, run one after another in one process beside this one, and their lines for a reader."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from spectra.errors import SpectraError

_RUNNER = """
import contextlib, io, json, sys
from spectra.cli import main

replies = sys.stdout
for line in sys.stdin:
    sys.argv[:] = ["spectra", *json.loads(line)]
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main.main(sys.argv[1:], prog_name="spectra")
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, said.getvalue()]), file=replies, flush=True)
"""


class Commands:
    """Runs `spectra …` and remembers the lines, for a reader to repeat. A context: the process ends with it.

    Args:
        say: takes one line of progress at a time.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.lines: list[str] = []
        self.say = say
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()

    def run(self, *arguments: str | Path) -> None:
        """One command; what it reports goes nowhere unless it fails.

        Raises:
            SpectraError: it failed; the message holds its own.
        """
        words = [str(argument) for argument in arguments]
        self.lines.append(shlex.join(["spectra", *words]))
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
            status, said = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            raise SpectraError(f"{self.lines[-1]} failed: its process was ended, perhaps for want of memory") from None
        if status:
            raise SpectraError(f"{self.lines[-1]} failed: {said.strip()[-500:]}")
