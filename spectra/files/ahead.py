"""What is going to be read from a server, said beforehand: it comes while other matrices are solved, and comes once.

A request costs a round trip, whatever its size, so small neighbours (the factors of an adapter, a layer's biases) come
together, and are let go when all of them have been read. What several updates are made of (a base that two of them
share, the rows of a fused weight that lie in columns) stays until the last of them has read it. All of that is bounded:
what has no room is read when it is asked for, and again if need be.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from spectra.errors import SourceError

SMALL = 2**20  # bytes: larger tensors are worth a request of their own
_LONGEST = 8 * 2**20  # bytes of a run
_GAP = 64  # bytes between neighbours that are read for nothing, such as padding
_AT_ONCE = 4  # runs that are fetched ahead side by side

Span = tuple[int, int]  # where the bytes of a tensor begin and end
Fetch = Callable[[int, memoryview], int]  # fills a buffer from an offset on, and says how many bytes there were


@dataclass(frozen=True)
class Wanted:
    """A tensor that is going to be read.

    Attributes:
        path: its file.
        span: where its bytes lie.
        fetch: reads from the file.
    """

    path: str
    span: Span
    fetch: Fetch


class Ahead:
    """What is going to be read, in order, and the bytes of it that have come.

    Args:
        matrices: the tensors of each matrix; one that is read several times occurs as often.
        room: bytes that may be here unread.
        fetches: whether to start fetching: the tensors of one matrix, before anyone asks for them.
    """

    def __init__(self, matrices: Sequence[Collection[Wanted]], room: int, *, fetches: bool = False) -> None:
        self._held, self._room, self._stopped, self._fetching = 0, room, False, 0
        self._limit = min(room, max(2 * _LONGEST, *map(_size_of, matrices), 0))
        self._changed = threading.Condition()
        counts: dict[str, Counter[Span]] = {}
        order = {(item.path, item.span): item for matrix in matrices for item in matrix}
        for item in (item for matrix in matrices for item in matrix):
            counts.setdefault(item.path, Counter())[item.span] += 1
        self._runs: dict[tuple[str, Span], _Run] = {}
        for path, spans in counts.items():
            for members in runs(spans):
                run = _Run({span: spans[span] for span in members}, order[path, members[0]].fetch)
                self._runs |= dict.fromkeys(((path, span) for span in members), run)
        in_order = dict.fromkeys(self._runs[key] for key in order)
        self._order = deque(run for run in in_order if run.size <= self._limit)  # others come when they are asked for
        for _ in range(_AT_ONCE if fetches else 0):
            threading.Thread(target=self._fetch_ahead, name="spectra-ahead", daemon=True).start()

    def __contains__(self, item: tuple[str, Span]) -> bool:
        return item in self._runs

    def stop(self) -> bool:
        """Fetch nothing more; whether something is still on its way."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            return self._fetching > 0

    def read_into(self, path: str, offset: int, buffer: memoryview, fetch: Fetch) -> int:
        """Fill the buffer: from what is here, or by `fetch`, with what will be read besides if there is room for it."""
        span = (offset, offset + len(buffer))
        run = self._runs[path, span]
        with run.lock:
            if run.content or (run.is_shared and run.left[span] and self._has_come(run)):
                buffer[:] = memoryview(run.content)[offset - run.start : offset - run.start + len(buffer)]
                self._mark_read(run, span)
                return len(buffer)
            run.left[span] = 0  # it is asked for now, by someone who keeps it
        return fetch(offset, buffer)

    def drop(self, path: str, span: Span) -> None:
        """One of the reads that were said will not be: its matrix cannot be done."""
        run = self._runs[path, span]
        with run.lock:
            if run.left[span] > 0:
                self._mark_read(run, span)

    def _fetch_ahead(self) -> None:
        """Fetch one run after another, as long as there is room."""
        while (run := self._next()) is not None:
            has_come = False
            try:
                if run.lock.acquire(blocking=False):  # else it is being read this moment
                    with _released(run.lock), suppress(SourceError):  # who reads it will be told
                        has_come = not run.content and any(run.left.values()) and _fill(run)
            finally:
                with self._changed:
                    self._fetching -= 1
                if not has_come:
                    self._release(run.size)

    def _next(self) -> _Run | None:
        """The next run once there is room for it, which it has then; None if there is none, or nobody waits for it."""
        with self._changed:
            while self._order and not self._stopped and self._held and self._held + self._order[0].size > self._limit:
                self._changed.wait()
            if not self._order or self._stopped:
                return None
            self._fetching += 1
            self._held += self._order[0].size
            return self._order.popleft()

    def _has_come(self, run: _Run) -> bool:
        """Fetch a run; False where too much is held already, or the file ends in it."""
        with self._changed:
            if self._held + run.size > self._room:
                return False
            self._held += run.size
        has_come = False
        try:
            has_come = _fill(run)
        finally:
            if not has_come:
                self._release(run.size)
        return has_come

    def _mark_read(self, run: _Run, span: Span) -> None:
        run.left[span] -= 1
        if run.content and not any(count > 0 for count in run.left.values()):
            run.content = bytearray()
            self._release(run.size)

    def _release(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()


def _size_of(matrix: Iterable[Wanted]) -> int:
    return sum(stop - start for start, stop in {(item.path, item.span): item.span for item in matrix}.values())


def _fill(run: _Run) -> bool:
    """Fetch a run's bytes; False where the file ends in it."""
    content = bytearray(run.size)
    if run.fetch(run.start, memoryview(content)) < run.size:
        return False
    run.content = content
    return True


@contextmanager
def _released(lock: threading.Lock) -> Iterator[None]:
    """Let go of a lock that is held in the end."""
    try:
        yield
    finally:
        lock.release()


class _Run:
    """Neighbours in one file, how often each will be read yet, and their bytes from the first to the last."""

    def __init__(self, left: dict[Span, int], fetch: Fetch) -> None:
        self.start, self.stop = min(left)[0], max(stop for _, stop in left)
        self.left, self.fetch, self.content, self.lock = left, fetch, bytearray(), threading.Lock()

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start

    @property
    def is_shared(self) -> bool:
        """Whether more than one read of it is to come."""
        return sum(self.left.values()) > 1


def runs(spans: Collection[Span]) -> Iterator[list[Span]]:
    """The spans, small neighbours in one list and every other in its own.

    >>> list(runs([(0, 10), (10, 20), (500, 600), (700, 702), (702, 708)]))
    [[(0, 10), (10, 20)], [(500, 600)], [(700, 702), (702, 708)]]
    """
    run: list[Span] = []
    for span in sorted(set(spans)):
        small = span[1] - span[0] <= SMALL and (not run or run[0][1] - run[0][0] <= SMALL)
        if run and small and 0 <= span[0] - run[-1][1] <= _GAP and span[1] - run[0][0] <= _LONGEST:
            run.append(span)
            continue
        if run:
            yield run
        run = [span]
    if run:
        yield run
