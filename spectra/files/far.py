"""What storages on other machines share: reading by ranges, several at a time, and what is going to be read."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from spectra.files.ahead import Ahead, Wanted
from spectra.files.patience import give_up
from spectra.files.storage import Place, Stamp
from spectra.files.tensors import TensorRef

_PIECE = 8 * 2**20  # bytes per request of what is large: enough to hide a round trip, little to ask for again
LANES = 8  # requests at a time in this process
_KEPT = 4 * 2**20  # bytes of a config or index that is kept
_ROOM = 128 * 2**20  # bytes that may be here before they are asked for, where nobody says another number

lanes = threading.BoundedSemaphore(LANES)
_ahead: list[Ahead] = []
_configs: dict[tuple[str, Stamp], bytes] = {}


class Far(ABC):
    """Files on another machine: `piece` asks for a range in one request, and everything else is the same for all."""

    @abstractmethod
    def piece(self, path: str, offset: int, buffer: memoryview, stamp: Stamp) -> int:
        """Fill the buffer with bytes of the version that the stamp names, and return how many there were.

        Raises:
            SourceError: they cannot be had.
        """

    @abstractmethod
    def stamp(self, path: str) -> Stamp:
        """As `Storage.stamp`."""

    @abstractmethod
    def local_path(self, path: str) -> str | None:
        """As `Storage.local_path`."""

    def leads_outside(self, path: str, folder: str) -> str | None:
        """There are no links."""
        return None

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """As `Storage.read_into`: what was fetched ahead is here, and a config or an index comes once."""
        stamp, span = self.stamp(path), (offset, offset + len(buffer))
        fetch = partial(self.fetch, path, stamp)
        if path.endswith(".json") and offset == 0 and len(buffer) == stamp[0] <= _KEPT:
            key = (path, stamp)
            if key not in _configs:
                count = fetch(0, buffer)
                _configs[key] = bytes(buffer[:count])
            buffer[: len(_configs[key])] = _configs[key]
            return len(_configs[key])
        for ahead in tuple(_ahead):
            if (path, span) in ahead:
                return ahead.read_into(path, offset, buffer, fetch)
        return fetch(offset, buffer)

    def fetch(self, path: str, stamp: Stamp, offset: int, buffer: memoryview) -> int:
        """Fill the buffer, in pieces side by side where it is large."""

        def piece(start: int) -> int:
            with lanes:
                return self.piece(path, offset + start, buffer[start : start + _PIECE], stamp)

        return sum(_all_of(piece, range(0, len(buffer), _PIECE)))


def is_remote(place: Place) -> bool:
    """Whether reading there asks another machine."""
    return isinstance(place.storage, Far) and place.storage.local_path(place.path) is None


@contextmanager
def expected(matrices: Iterable[Iterable[TensorRef]], room: int = _ROOM, *, fetches: bool = False) -> Iterator[None]:
    """Say what is going to be read, in order: small neighbours come together, and what is read twice comes once.

    Args:
        matrices: the tensors of every matrix; one that will be read twice occurs twice.
        room: bytes that may be here before they are asked for.
        fetches: fetch a matrix ahead of those that are asked for.
    """
    wanted = [found for matrix in matrices if (found := list(_far_parts(matrix)))]
    if not wanted:
        yield
        return
    ahead = Ahead(wanted, room, fetches=fetches)
    _ahead.append(ahead)
    try:
        yield
    finally:
        _ahead.remove(ahead)
        if ahead.stop():
            give_up()  # of what nobody waits for any more


def dropped(refs: Iterable[TensorRef]) -> None:
    """Say that a matrix will not be read after all."""
    for item in _far_parts(refs):
        for ahead in tuple(_ahead):
            if (item.path, item.span) in ahead:
                ahead.drop(item.path, item.span)


def _far_parts(refs: Iterable[TensorRef]) -> Iterator[Wanted]:
    for part in (part for ref in refs for part in ref.parts):
        if isinstance(part.storage, Far) and part.bytes_read > 0 and is_remote(part.file):
            span = (part.offset, part.offset + part.bytes_read)
            yield Wanted(part.path, span, partial(part.storage.fetch, part.path, part.stamp))


def _all_of(piece: Callable[[int], int], starts: range) -> list[int]:
    if len(starts) < 2:
        return [piece(start) for start in starts]
    pool = ThreadPoolExecutor(min(LANES, len(starts)))
    try:
        return list(pool.map(piece, starts))
    except KeyboardInterrupt:
        give_up()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
