"""What storages on other machines share: reading by ranges, several at a time, and what is going to be read."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from spectra.files import lanes
from spectra.files.ahead import Ahead, Wanted
from spectra.files.lanes import Sink
from spectra.files.patience import give_up
from spectra.files.storage import DISK, Place, Stamp
from spectra.files.tensors import TensorRef
from spectra.files.versions import tells_content

_KEPT = 4 * 2**20  # bytes of a config or index that is kept
_ALL_KEPT = 64 * 2**20  # bytes of all configs, indices and headers that are

copied: dict[str, tuple[str, Stamp]] = {}  # file on another machine → its copy on this one, and of which version
_ahead: list[Ahead] = []
_keeping = threading.Lock()
_heads: dict[tuple[str, Stamp, int, int], bytes] = {}  # file, version, from where and how many bytes → the bytes


class Far(ABC):
    """Files on another machine: `piece` asks for a range in one request, and everything else is the same for all."""

    @abstractmethod
    def piece(self, path: str, offset: int, buffer: Sink, stamp: Stamp) -> int:
        """Fill the buffer with bytes of the version that the stamp names, and return how many there were.

        Raises:
            SourceError: they cannot be had.
        """

    @abstractmethod
    def stamp(self, path: str) -> Stamp:
        """As `Storage.stamp`."""

    def local_path(self, path: str) -> str | None:
        """Where a copy of the version at hand is."""
        local, stamp = copied.get(path, ("", None))
        return local if stamp is not None and stamp == self.stamp(path) and DISK.is_file(local) else None

    def leads_outside(self, path: str, folder: str) -> str | None:
        """There are no links."""
        return None

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """As `Storage.read_into`: from a copy, or what was fetched ahead; a config or an index comes once."""
        if (local := self.local_path(path)) is not None:
            return DISK.read_into(local, offset, buffer)
        stamp, key = self.stamp(path), (path, (offset, offset + len(buffer)))
        fetch = partial(self.fetch, path, stamp)
        if path.endswith(".json") and offset == 0 and len(buffer) == stamp[0] <= _KEPT:
            return self.head_into(path, 0, buffer)
        for ahead in tuple(_ahead):
            if key in ahead and ahead.read_into(key, buffer):
                return len(buffer)
        return fetch(offset, buffer)

    def head_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """As `read_into`, of what a file says of itself, which several openings ask for: it stays in memory."""
        if (local := self.local_path(path)) is not None:
            return DISK.read_into(local, offset, buffer)
        stamp = self.stamp(path)
        key = (path, stamp, offset, len(buffer))
        content = _heads.get(key)
        if content is None:
            content = bytes(buffer[: self.fetch(path, stamp, offset, buffer)])
            _keep_head(key, content)
        buffer[: len(content)] = content
        return len(content)

    def fetch(self, path: str, stamp: Stamp, offset: int, buffer: memoryview) -> int:
        """Fill the buffer, in pieces side by side where it is large."""

        def piece(start: int) -> int:
            return self.in_a_lane(path, stamp, offset + start, buffer[start : start + lanes.PIECE])

        return sum(lanes.all_of(piece, range(0, len(buffer), lanes.PIECE)))

    def in_a_lane(self, path: str, stamp: Stamp, offset: int, buffer: Sink) -> int:
        """Fill the buffer by one request, once there are few enough others."""
        with lanes.lanes:
            return self.piece(path, offset, buffer, stamp)


def _keep_head(key: tuple[str, Stamp, int, int], content: bytes) -> None:
    """Keep the bytes, and let go of those that came first where there are too many."""
    with _keeping:
        _heads[key] = content
        while sum(map(len, _heads.values())) > _ALL_KEPT:
            del _heads[next(iter(_heads))]


def look_anew(address: str) -> None:
    """Forget heads below an address whose versions do not tell whether they are the same still."""
    with _keeping:
        for key in [key for key in _heads if key[0].startswith(address) and not tells_content(key[1])]:
            del _heads[key]


def is_remote(place: Place) -> bool:
    """Whether reading there asks another machine."""
    return isinstance(place.storage, Far) and place.storage.local_path(place.path) is None


@contextmanager
def expected(matrices: Iterable[Iterable[TensorRef]], *, fetches: bool = False) -> Iterator[None]:
    """Say what is going to be read, in order: small neighbours come together, and everything comes once.

    What came stays on this machine's disk until all matrices that it is part of are `done`, or the block has ended; of
    a run that is broken off it stays for the next.

    Args:
        matrices: the tensors of every matrix.
        fetches: fetch a matrix ahead of those that are asked for.
    """
    wanted = [found for matrix in matrices if (found := list(_far_parts(matrix)))]
    if not wanted:
        yield
        return
    ahead = Ahead(wanted, fetches=fetches)
    _ahead.append(ahead)
    broken_off = True
    try:
        yield
        broken_off = False
    except GeneratorExit:  # of whoever has seen enough
        broken_off = False
        raise
    finally:
        _ahead.remove(ahead)
        if ahead.stop(keep=broken_off):
            give_up()  # of what nobody waits for any more


def done(refs: Iterable[TensorRef]) -> None:
    """Say that nothing more is read of a matrix: its result is where it belongs, or it has none."""
    for item in set(_far_parts(refs)):
        for ahead in tuple(_ahead):
            if item.key in ahead:
                ahead.done(item.key)


def is_at_hand(ref: TensorRef) -> bool:
    """Whether reading it once more, while its matrix is at work, asks no other machine."""
    return all(any(ahead.has(item.key) for ahead in tuple(_ahead)) for item in _far_parts([ref]))


def _far_parts(refs: Iterable[TensorRef]) -> Iterator[Wanted]:
    for part in (part for ref in refs for part in ref.parts):
        if isinstance(part.storage, Far) and part.bytes_read > 0 and is_remote(part.file):
            span = (part.offset, part.offset + part.bytes_read)
            yield Wanted(part.path, span, part.stamp, part.storage.in_a_lane)
