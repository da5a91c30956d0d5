"""Which matrices this process reads and solves just now, and how much of a plan is done: what a bar of progress tells.

Whoever reads or solves a matrix writes it down, thread by thread; whoever shows progress looks. Nobody waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AtWork:
    """A matrix in one thread's hands.

    Attributes:
        name: of the matrix.
        shape: (out, in).
        doing: "reading" or "solving".
        since: by `time.monotonic`.
    """

    name: str
    shape: tuple[int, ...]
    doing: str
    since: float


_AT_WORK: dict[int, AtWork] = {}  # a thread's id → what it has in hands


@contextmanager
def in_hands(doing: str, name: str, shape: tuple[int, ...]) -> Iterator[None]:
    """This thread has a matrix in hands inside; the one that it had before is in hands again afterwards."""
    thread = threading.get_ident()
    before = _AT_WORK.get(thread)
    _AT_WORK[thread] = AtWork(name, shape, doing, time.monotonic())
    try:
        yield
    finally:
        _AT_WORK.pop(thread)
        if before is not None:
            _AT_WORK[thread] = before


def at_work() -> list[AtWork]:
    """What is in hands just now, the one that takes longest first."""
    return sorted(_AT_WORK.values(), key=lambda one: one.since)


@dataclass
class Account:
    """The work of a plan, as the engine counts it before it reads anything, and what of it is done.

    Attributes:
        costs: of each matrix, by name.
        total: of all of them.
        measure: finds out how many operations per second this machine makes of such matrices; None where it cannot.
        pace: what that found; 0 as long as nobody asked.
        done: operations of the matrices that are finished.
        latest: seconds from the start to the last of them that cost something.
    """

    costs: Mapping[str, float]
    total: float
    measure: Callable[[], float] | None = None
    pace: float = 0.0
    done: float = 0.0
    latest: float = 0.0
    start: float = field(default_factory=time.monotonic)
    _halves: float = 0.0

    def ask(self) -> None:
        """Measure the pace, if this can be done."""
        if self.measure is not None:
            self.pace = self.measure()
            self.start = time.monotonic()

    def finish(self, name: str) -> None:
        """This matrix is done; others that are in hands count for half."""
        cost = self.costs.get(name, 0.0)
        if cost:
            others = sum(self.costs.get(one.name, 0.0) for one in tuple(_AT_WORK.values()) if one.name != name)
            self.done, self._halves = self.done + cost, others / 2
            self.latest = time.monotonic() - self.start

    def left(self) -> float | None:
        """About how many seconds the rest takes; None where nothing tells.

        At the pace so far, and before the first matrix is done at the one that was measured.
        """
        pace = (self.done + self._halves) / self.latest if self.latest else self.pace
        if not pace:
            return None
        seconds = self.total / pace - (time.monotonic() - self.start)
        return seconds if seconds > 0 else None


_WATCHERS: list[Callable[[Account], None]] = []


@contextmanager
def watched(by: Callable[[Account], None]) -> Iterator[None]:
    """Tell of each plan that begins meanwhile, before its first matrix is read."""
    _WATCHERS.append(by)
    try:
        yield
    finally:
        _WATCHERS.remove(by)


def announce(account: Account) -> Account:
    """Tell those who watch that this plan begins."""
    for by in tuple(_WATCHERS):
        by(account)
    return account
