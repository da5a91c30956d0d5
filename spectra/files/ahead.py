"""What is small and lies side by side on a server is asked for at once: the factors of an adapter, a layer's biases.

A request costs a round trip, whatever its size. What will be read is said beforehand, and the first read of a run of
small neighbours brings the others along; the run is let go when all of them have been read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping

SMALL = 2**20  # bytes: larger tensors are worth a request of their own
_LONGEST = 8 * 2**20  # bytes of a run
_GAP = 64  # bytes between neighbours that are read for nothing, such as padding
_HELD = 128 * 2**20  # bytes that may be here unread

Span = tuple[int, int]  # where the bytes of a tensor begin and end
Fetch = Callable[[int, memoryview], int]  # fills a buffer from an offset on, and says how many bytes there were


class Ahead:
    """The runs among what is going to be read, and the bytes of those that have come.

    Args:
        spans: path → where the bytes of its tensors lie that are going to be read.
    """

    def __init__(self, spans: Mapping[str, Collection[Span]]) -> None:
        self._held, self._lock = 0, threading.Lock()
        self._runs: dict[tuple[str, Span], _Run] = {}
        for path, wanted in spans.items():
            for members in runs(wanted):
                run = _Run(members)
                self._runs |= dict.fromkeys(((path, span) for span in members), run)

    def read_into(self, path: str, offset: int, buffer: memoryview, fetch: Fetch) -> int:
        """Fill the buffer: from a run, which is fetched if it is not here, or by `fetch` alone."""
        span = (offset, offset + len(buffer))
        run = self._runs.get((path, span))
        if run is None:
            return fetch(offset, buffer)
        with run.lock:
            if span in run.left and (run.content or self._bring(run, fetch)):
                buffer[:] = run.content[offset - run.start : offset - run.start + len(buffer)]
                self._mark_read(run, span)
                return len(buffer)
        return fetch(offset, buffer)

    def _bring(self, run: _Run, fetch: Fetch) -> bool:
        """Fetch a run; False where too much is held already, or the file ends in it."""
        size = run.stop - run.start
        with self._lock:
            if self._held + size > _HELD:
                return False
            self._held += size
        content = bytearray(size)
        try:
            if fetch(run.start, memoryview(content)) == size:
                run.content = content
        finally:
            if not run.content:
                self._release(size)
        return bool(run.content)

    def _mark_read(self, run: _Run, span: Span) -> None:
        run.left.discard(span)
        if not run.left:
            run.content = bytearray()
            self._release(run.stop - run.start)

    def _release(self, size: int) -> None:
        with self._lock:
            self._held -= size


class _Run:
    """Neighbours in one file, which of them were not read yet, and their bytes from the first to the last read."""

    def __init__(self, members: Collection[Span]) -> None:
        self.start, self.stop = min(members)[0], max(stop for _, stop in members)
        self.left, self.content, self.lock = set(members), bytearray(), threading.Lock()


def runs(spans: Collection[Span]) -> Iterator[list[Span]]:
    """Those spans that have a neighbour, as lists of neighbours.

    >>> list(runs([(0, 10), (10, 20), (500, 600), (700, 702), (702, 708)]))
    [[(0, 10), (10, 20)], [(700, 702), (702, 708)]]
    """
    run: list[Span] = []
    for span in sorted(set(spans)):
        if run and 0 <= span[0] - run[-1][1] <= _GAP and span[1] - run[0][0] <= _LONGEST:
            run.append(span)
            continue
        if len(run) > 1:
            yield run
        run = [span]
    if len(run) > 1:
        yield run
