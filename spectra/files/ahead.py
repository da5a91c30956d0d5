"""What is going to be read from a server, said beforehand: it comes while other matrices are solved, and comes once.

A request costs a round trip, whatever its size, so small neighbours (the factors of an adapter, a layer's biases) come
together. What came is kept on the disk (`Range`) until the matrices that it is part of are done: a base that two
updates share, or that is read again to replay rounding on it, comes once, and no memory is taken for it. No more than
one matrix is fetched ahead. Where the disk has no room, everything is read when it is asked for.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from spectra.errors import SourceError
from spectra.files.lanes import Sink
from spectra.files.ranges import Range
from spectra.files.storage import Stamp

SMALL = 2**20  # bytes: larger tensors are worth a request of their own
_LONGEST = 8 * 2**20  # bytes of a run
_GAP = 64  # bytes between neighbours that are read for nothing, such as padding
_AT_ONCE = 4  # runs that are fetched ahead side by side

Span = tuple[int, int]  # where the bytes of a tensor begin and end
Key = tuple[str, Span]  # a file and where in it


@dataclass(frozen=True)
class Wanted:
    """A tensor that is going to be read.

    Attributes:
        path: its file.
        span: where its bytes lie.
        stamp: the file's version.
        fetch: reads from the file of a path and version, from an offset on.
    """

    path: str
    span: Span
    stamp: Stamp
    fetch: Callable[[str, Stamp, int, Sink], int]

    @property
    def key(self) -> Key:
        """What it is asked for by."""
        return self.path, self.span


class Ahead:
    """What is going to be read, in order, and the bytes of it that have come.

    Args:
        matrices: the tensors of each matrix.
        fetches: whether to start fetching: the tensors of one matrix, before anyone asks for them.
    """

    def __init__(self, matrices: Sequence[Collection[Wanted]], *, fetches: bool = False) -> None:
        self._unread, self._stopped, self._kept, self._fetching = 0, False, False, 0
        self._limit = max(2 * _LONGEST, *map(_size_of, matrices), 0)
        self._changed = threading.Condition()
        counts: dict[str, Counter[Span]] = {}
        order = {item.key: item for matrix in matrices for item in matrix}
        for path, span in (key for matrix in matrices for key in {item.key for item in matrix}):
            counts.setdefault(path, Counter())[span] += 1
        self._runs: dict[Key, _Run] = {}
        for path, spans in counts.items():
            for members in runs(spans):
                run = _Run({span: spans[span] for span in members}, order[path, members[0]])
                self._runs |= dict.fromkeys(((path, span) for span in members), run)
        self._order = deque(dict.fromkeys(self._runs[key] for key in order))
        for _ in range(_AT_ONCE if fetches else 0):
            threading.Thread(target=self._fetch_ahead, name="spectra-ahead", daemon=True).start()

    def __contains__(self, key: Key) -> bool:
        return key in self._runs

    def stop(self, *, keep: bool = False) -> bool:
        """Fetch nothing more, and let go of what is here; whether something is still on its way.

        Args:
            keep: leave on the disk what no matrix is done of, for the run that goes on.
        """
        with self._changed:
            self._stopped, self._kept = True, keep
            self._changed.notify_all()
        for run in set(self._runs.values()):
            if run.lock.acquire(blocking=False):  # else whoever is at it lets go of it
                with _released(run.lock):
                    run.range.close(keep=keep)
        return self._fetching > 0

    def has(self, key: Key) -> bool:
        """Whether it has come."""
        return key in self._runs and self._runs[key].range.is_here

    def read_into(self, key: Key, buffer: memoryview) -> bool:
        """Fill the buffer, and fetch before what is not here; False where it has to be read without being kept.

        Raises:
            SourceError: it cannot be had.
        """
        run = self._runs[key]
        with self._at(run):
            self._begin(run)
            if self._stopped or not run.range.bring():
                return False
            return run.range.read_into(key[1][0] - run.range.start, buffer) == len(buffer)

    def done(self, key: Key) -> None:
        """A matrix that it is part of is done."""
        run = self._runs[key]
        with self._at(run):
            run.left[key[1]] -= 1
            if not any(count > 0 for count in run.left.values()):
                self._begin(run)
                run.range.close()

    def _fetch_ahead(self) -> None:
        """Fetch one run after another, as long as there is room."""
        while (run := self._next()) is not None:
            try:
                with suppress(SourceError):  # who reads it will be told
                    self._fetch(run)
            finally:
                with self._changed:
                    self._fetching -= 1

    def _fetch(self, run: _Run) -> None:
        """Fetch a run, unless somebody is at it."""
        if not run.lock.acquire(blocking=False):
            return
        has_come = False
        with self._at(run, is_locked=True):
            try:
                has_come = run.is_ahead and run.range.bring()
            finally:
                if not has_come:
                    self._begin(run)

    def _next(self) -> _Run | None:
        """The next run that nobody has asked for, once there is room for it; None if there is none any more."""
        with self._changed:
            while not self._stopped:
                while self._order and self._order[0].is_begun:
                    self._order.popleft()
                if not self._order:
                    return None
                if not self._unread or self._unread + self._order[0].range.size <= self._limit:
                    run = self._order.popleft()
                    run.is_ahead, self._fetching = True, self._fetching + 1
                    self._unread += run.range.size
                    return run
                self._changed.wait()
            return None

    def _begin(self, run: _Run) -> None:
        """It is not ahead any more: it is being read, or nobody will."""
        with self._changed:
            self._unread -= run.range.size if run.is_ahead else 0
            run.is_ahead, run.is_begun = False, True
            self._changed.notify_all()

    @contextmanager
    def _at(self, run: _Run, *, is_locked: bool = False) -> Iterator[None]:
        """Nobody else is at a run meanwhile; once all is stopped, its bytes go with whoever was."""
        if not is_locked:
            run.lock.acquire()
        with _released(run.lock):
            try:
                yield
            finally:
                if self._stopped:
                    run.range.close(keep=self._kept)


def _size_of(matrix: Iterable[Wanted]) -> int:
    return sum(stop - start for _, (start, stop) in {item.key for item in matrix})


@contextmanager
def _released(lock: threading.Lock) -> Iterator[None]:
    """Let go of a lock that is held in the end."""
    try:
        yield
    finally:
        lock.release()


class _Run:
    """Neighbours in one file, and of how many matrices each is part that are not done yet.

    Attributes:
        left: span → how many matrices.
        range: the bytes from the first to the last.
        is_ahead: whether it was fetched, or is being fetched, and nobody has asked for it.
        is_begun: whether somebody has asked for it.
    """

    def __init__(self, left: dict[Span, int], first: Wanted) -> None:
        start, stop = min(left)[0], max(stop for _, stop in left)
        self.left, self.lock, self.is_ahead, self.is_begun = left, threading.Lock(), False, False
        fetch = partial(first.fetch, first.path, first.stamp)
        self.range = Range(first.path, first.stamp, start, stop - start, fetch)


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
