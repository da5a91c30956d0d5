"""How long a server is asked again: until it has given nothing for a while, or nobody waits any more."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

from spectra.errors import NotFoundError, SourceError

PATIENCE = 120.0  # seconds that a server which has answered before may go without giving a byte
FIRST = 5.0  # the same for one that never has
_Found = TypeVar("_Found")
LEAST = 2**16  # bytes that count as giving something; where less is left of a range, all of that
_LONGEST_WAIT = 8.0  # seconds between two attempts, unless the server asks for more

answered: set[str] = set()  # servers that have
_silent: set[str] = set()  # those of calls without a limit whose last answer did not come
_given_up = 0  # times


class TryAgainError(Exception):
    """A request that may do better the next time.

    Args:
        why: what happened.
        wait: seconds after which the server says so.
        most: attempts after which it is the answer; None for as many as there is time for.
    """

    def __init__(self, why: str, wait: float | None = None, most: int | None = None) -> None:
        super().__init__(why)
        self.wait, self.most = wait, most


def give_up() -> None:
    """Let no read that is going on try again: who asked is not waiting any more."""
    global _given_up
    _given_up += 1


class Patience:
    """How long a server is asked again: until it has given nothing for a while."""

    def __init__(self, url: str, first: float | None = None) -> None:
        self._url, self._origin = url, origin(url)
        self._limit = first if first is not None else PATIENCE if self._origin in answered else FIRST
        self._since, self._attempts, self._came = time.monotonic(), 0, 0
        self._given_up = _given_up

    def answered(self) -> None:
        """The server is there: it gets the longer time."""
        answered.add(self._origin)
        self._limit = PATIENCE

    def renew(self, count: int) -> None:
        """So many bytes came; only where that is something, there is as much time again.

        Raises:
            TryAgainError: they trickle, and the time is over.
        """
        self.answered()
        self._came, self._attempts = self._came + count, 0
        passed = time.monotonic() - self._since
        if self._came >= LEAST:
            self._since, self._came = time.monotonic(), 0
        elif passed > self._limit:
            raise TryAgainError(f"{self._came} bytes came in {passed:.0f} s, which has no end")

    def wait(self, problem: TryAgainError) -> None:
        """Sleep before the next attempt.

        Raises:
            SourceError: the time is over, or the server asks for more than there is.
        """
        if self._given_up != _given_up:
            raise SourceError(f"{self._url}: reading was given up")
        if problem.most is not None and self._attempts >= problem.most:
            raise NotFoundError(f"{self._url}: {problem}")
        if self._origin in answered:
            self._limit = max(self._limit, PATIENCE)
        backoff = min(_LONGEST_WAIT, 0.25 * 2**self._attempts) * (0.5 + random.random() / 2)
        pause = backoff if problem.wait is None else max(problem.wait, 0.0)
        left = self._since + self._limit - time.monotonic()
        self._attempts += 1
        if pause > left:
            answered.discard(self._origin)  # what is asked next does not wait as long for a server that is gone
            asked = f", and asks to wait {pause:.0f} s" if problem.wait is not None else ""
            raise SourceError(
                f"{self._url} cannot be read: {problem}{asked}; tried for {self._limit:g} s: "
                "run the same again later, what is stored is kept"
            )
        until = time.monotonic() + pause
        while (left := until - time.monotonic()) > 0 and self._given_up == _given_up:
            time.sleep(min(left, 0.5))


@contextmanager
def in_time(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop`, which ends the block, from another thread if it takes longer than any server is waited for.

    Raises:
        TryAgainError: it did, and had to be ended.
    """
    seconds, over = PATIENCE, threading.Event()

    def end() -> None:
        over.set()
        stop()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if over.is_set() and isinstance(sys.exception(), Exception):  # which the end of the connection raised
            raise TryAgainError(f"no whole answer within {seconds:g} s, though something came") from None


def answer(url: str, ask: Callable[[], _Found], size: int = 0) -> _Found:
    """What a call gives that has no limit of its own; where nothing comes, it is left behind in its thread.

    Args:
        url: what it asks for.
        ask: the call.
        size: how many bytes it brings; each 32 KiB have a second more.

    Raises:
        SourceError: nothing came in time, or nobody waits any more.
    """
    future: Future[_Found] = Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except BaseException as problem:  # noqa: BLE001 (it is raised where it was asked)
            future.set_exception(problem)

    threading.Thread(target=work, name="spectra-call", daemon=True).start()
    server, given_up = origin(url), _given_up
    seconds = (FIRST if server in _silent else PATIENCE) + size / 2**15
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and given_up == _given_up and not future.done():
        wait([future], timeout=min(left, 0.5))
    if given_up != _given_up:
        raise SourceError(f"{url}: reading was given up")
    if not future.done():
        _silent.add(server)
        raise SourceError(f"{url} cannot be read: no answer within {seconds:.3g} s; run the same again later")
    _silent.discard(server)
    return future.result()


def origin(url: str) -> str:
    """The server of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
