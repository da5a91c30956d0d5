"""How far a command is, and what is left of it when it is stopped."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from spectra.cli.interrupts import STOPPED
from spectra.cli.talk import is_quiet, say

_EVERY = 1.0  # seconds


class Progress:
    """A bar with ETA on a terminal's stderr, nothing in a pipe; Ctrl-C ends the command with a word on what is kept.

    Args:
        total: how many there are to do.
        what: the command.
        kept: where they are stored as they come, so that the same command goes on; "" for nowhere.
        otherwise: what to say where they are not.
    """

    def __init__(self, total: int, what: str, *, kept: str = "", otherwise: str = "nothing is stored") -> None:
        self._total, self._done = total, 0
        self._kept, self._otherwise = kept, otherwise
        self._start, self._before = time.monotonic(), _received()
        self._count, self._latest = 0, self._start
        self._bar = _bar(total, what)
        self._over = threading.Event()
        if not self._bar.disable and _http() is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def update(self) -> None:
        """One more is done."""
        self._done += 1
        self._say_what_is_read()
        self._bar.update()

    def _say_what_is_read(self) -> None:
        """Bytes and rate, where they come from a server."""
        count = _received() - self._before
        if count > self._count:
            self._count, self._latest = count, time.monotonic()
        if count:
            rate = count / max(self._latest - self._start, 1e-3)  # of the time until the last of them came
            self._bar.set_postfix_str(f"{count / 2**20:,.1f} MiB read, {rate / 2**20:,.1f} MiB/s", refresh=False)

    def _watch(self) -> None:
        """Show the bytes as they come: a large matrix takes minutes."""
        while not self._over.wait(_EVERY):
            self._say_what_is_read()
            self._bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._bar.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            say(f"stopped; {self.stopped}", err=True)
            sys.exit(STOPPED)

    @property
    def stopped(self) -> str:
        """What is left of the work up to here."""
        if self._kept:
            return f"{self._done} of {self._total} are stored in {self._kept}, the same command goes on"
        return f"{self._done} of {self._total} were done, {self._otherwise}"


@contextmanager
def downloading(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes with their rate, from the first call on, which tells those that came and those of all."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def told(came: int, total: int) -> None:
        if not bars:
            shown: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
            off = True if is_quiet() else None
            bars.append(tqdm(desc=what, total=total, initial=came, file=sys.stderr, disable=off, **shown))
        bars[0].update(came - bars[0].n)

    try:
        yield told
    finally:
        for bar in bars:
            bar.close()


def _received() -> int:
    """Bytes from servers so far; none before anything that talks to one was loaded."""
    http = _http()
    return http.received() if http is not None else 0


def _http() -> Any:
    """What talks to servers; None before anything loaded it."""
    return sys.modules.get("spectra.files.http")


def _bar(total: int, what: str) -> Any:
    from tqdm import tqdm

    off = True if is_quiet() else None  # None: where stderr is no terminal
    return tqdm(total=total, desc=what, unit="matrix", file=sys.stderr, disable=off, leave=False, dynamic_ncols=True)
