"""How far a command is, and what is left of it when it is stopped."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from spectra.cli.interrupts import STOPPED
from spectra.cli.talk import is_quiet, say
from spectra.deltas.at_work import Account, AtWork, at_work, watched
from spectra.printing import printed

_EVERY = 1.0  # seconds
_AT_ONCE = 0.05  # seconds within which nobody reads more than one thing
_LONG = 3e11  # operations: about ten seconds, of which a quarter of a second may go into measuring the pace
_AT_START = "measuring this machine's pace"
_LONGEST = 40  # characters of a matrix's name
_FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar:10}| {elapsed}{postfix}"


class Progress:
    """A bar with ETA on a terminal's stderr, nothing in a pipe; Ctrl-C ends the command with a word on what is kept.

    Args:
        total: how many there are to do.
        what: the command.
        plans: how many plans of about the same cost the work is made of, as a series is of its checkpoints.
        kept: where they are stored as they come, so that the same command goes on; "" for nowhere.
        otherwise: what to say where they are not.
        parts: tells what is stored besides, where one to do is made of several that are stored one by one.
    """

    def __init__(
        self,
        total: int,
        what: str,
        *,
        plans: int = 1,
        kept: str = "",
        otherwise: str = "nothing is stored",
        parts: Callable[[], str] | None = None,
    ) -> None:
        self._total, self._done = total, 0
        self._kept, self._otherwise, self._parts = kept, otherwise, parts
        self._start, self._before = time.monotonic(), _received()
        self._count, self._latest, self._told = 0, self._start, -_AT_ONCE
        self._bar = _bar(total, what)
        self._over = threading.Event()
        self._account: Account | None = None
        self._plans = plans  # that are still to begin
        self._watching = ExitStack()
        if not self._bar.disable:
            self._watching.enter_context(watched(self._begin))
            threading.Thread(target=self._watch, daemon=True).start()

    def _begin(self, account: Account) -> None:
        """A plan that takes long is told the time left before its first matrix is done, if a pace can be measured."""
        self._plans = max(self._plans - 1, 0)
        if self._account is not None and self._account.reached:
            account.pace = self._account.reached
        elif account.measure is not None and (1 + self._plans) * account.total > _LONG:
            self._say(_AT_START)
            account.ask()
        self._account = account

    def update(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if not self._bar.disable and (now - self._told > _AT_ONCE or self._done == self._total):
            self._told = now
            self._tell()
        self._bar.update()

    def _tell(self) -> None:
        """The time left by costs, bytes and rate where they come from a server, and the matrix that is at work."""
        read = self._read()
        now = "" if self._done == self._total else _in_hands(at_work())
        self._say(", ".join(filter(None, (self._left(bool(read)), read, now))))

    def _say(self, words: str) -> None:
        self._bar.set_postfix_str(words, refresh=False)

    def _left(self, far: bool) -> str:
        """About how long the rest takes, by costs where a plan has them; nothing before the first is done if servers
        set the pace."""
        if self._account is None:
            spent, rest = time.monotonic() - self._start, self._total - self._done
            seconds = spent * rest / self._done if self._done and rest else None
        else:
            seconds = self._account.left(self._plans) if self._account.done or not far else None
        return "" if seconds is None else f"about {duration(seconds)} left"

    def _read(self) -> str:
        count = _received() - self._before
        if count > self._count:
            self._count, self._latest = count, time.monotonic()
        if not count:
            return ""
        rate = count / max(self._latest - self._start, 1e-3)  # of the time until the last of them came
        return f"{count / 2**20:,.1f} MiB read, {rate / 2**20:,.1f} MiB/s"

    def _watch(self) -> None:
        """Tell it again and again: a large matrix takes minutes."""
        while not self._over.wait(_EVERY):
            self._tell()
            self._bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watching.close()
        self._bar.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            say(f"stopped; {self.stopped}", err=True)
            sys.exit(STOPPED)

    @property
    def stopped(self) -> str:
        """What is left of the work up to here."""
        if self._kept:
            parts = f" ({told})" if self._parts is not None and (told := self._parts()) else ""
            return f"{self._done} of {self._total} are stored in {self._kept}{parts}, the same command goes on"
        return f"{self._done} of {self._total} were done, {self._otherwise}"


def duration(seconds: float) -> str:
    """A time that nobody knows exactly, in words.

    >>> duration(8), duration(95), duration(9000)
    ('8 s', '2 min', '2.5 h')
    """
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _in_hands(matrices: list[AtWork]) -> str:
    """What has been at work for the longest time, and how many more there are."""
    if not matrices:
        return ""
    first = matrices[0]
    name = first.name if len(first.name) <= _LONGEST else f"…{first.name[1 - _LONGEST :]}"
    others = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
    return printed(f"{first.doing} {name} ({'×'.join(map(str, first.shape))}){others}")


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
    shown: dict[str, Any] = {"file": sys.stderr, "leave": False, "dynamic_ncols": True, "bar_format": _FORMAT}
    return tqdm(total=total, desc=what, unit="matrix", disable=off, **shown)
