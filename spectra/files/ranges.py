"""Ranges of files on servers, kept on this machine's disk until what they were read for is done.

In memory they would stand beside the matrices that are solved meanwhile; here they also outlive a run that is killed. A
range lies in a file named after what it is (address, version, first and last byte), so the run that goes on, or another
one, comes upon it. Every piece gets its checksum behind the bytes once it is whole: what a kill left half written, or a
crash of the machine unwritten, is fetched again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from spectra.files import lanes
from spectra.files.lanes import Sink
from spectra.files.snapshots import spectras_cache
from spectra.files.storage import Stamp
from spectra.files.versions import is_date, tells_content

_SPARE = 2**30  # bytes that stay free on the disk
_OLD = 7 * 24 * 3600.0  # seconds after which nobody comes back for what a killed run left
_MARK = struct.Struct("<II")  # of a piece that is whole: its checksum, and the same with every bit turned
_SAMPLE = 2**10  # bytes of a piece that are asked for again where its file's version may be that of other content
_NAME = re.compile(r"[0-9a-f]{40}")
_BLOCK = 2**20  # bytes in memory at a time

Fetch = Callable[[int, Sink], int]  # fills a buffer from an offset on, and says how many bytes there were

_again: dict[str, set[Path]] = {}  # addresses below which ranges are wanted once more → those that are here


def folder() -> Path:
    """Where ranges are kept."""
    return spectras_cache() / "ranges"


@contextmanager
def read_again(address: str) -> Iterator[None]:
    """Keep what is read below an address until the block ends, since all of it will be read several times."""
    _again[address] = set()
    over = False
    try:
        yield
        over = True
    except GeneratorExit:  # of whoever has seen enough; after any other end the same may be asked for again
        over = True
        raise
    finally:
        for file in _again.pop(address) if over else ():
            _remove(file)


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()


class Range:
    """Bytes of one version of a file, kept piece by piece as they come. One thread at a time may use it.

    Args:
        path: the file's address.
        stamp: its size and version.
        start: the first byte.
        size: how many.
        fetch: reads from the server.
    """

    def __init__(self, path: str, stamp: Stamp, start: int, size: int, fetch: Fetch) -> None:
        self.path, self.start, self.size, self._fetch = path, start, size, fetch
        said = f"{path}|{stamp!r}|{start}|{size}|{lanes.PIECE}"
        self._name = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:40]
        self._is_dated, self._is_sure = is_date(stamp[1]), tells_content(stamp)
        self._cannot_be_kept = False
        self._place: Path | None = None
        self._file: int | None = None
        self.is_here = False

    def bring(self) -> bool:
        """Have all of it here, fetching what is not; False where it cannot be kept, or the file ends in it.

        Raises:
            SourceError: the server does not give it.
        """
        if self.is_here or self._cannot_be_kept:
            return self.is_here
        try:
            file = self._file = self._open() if self._file is None else self._file
            starts = range(0, self.size, lanes.PIECE)
            sound = [start for start in starts if self._is_sound(file, start)]
            if not self._is_sure and not all(lanes.all_of(lambda start: self._is_still(file, start), sound)):
                sound = []
            missing = [start for start in starts if start not in sound]
            self.is_here = all(lanes.all_of(lambda start: self._fetched(file, start), missing))
        except OSError:  # of the disk: it is full, or cannot be written to
            self._cannot_be_kept = True
            self.close()
        return self.is_here

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer with bytes from an offset in the range on; all of it is here."""
        assert self._file is not None
        filled = 0
        while filled < len(buffer) and (count := os.preadv(self._file, [buffer[filled:]], offset + filled)):
            filled += count
        return filled

    def close(self, *, keep: bool = False) -> None:
        """Let go of what is here.

        Args:
            keep: leave it on the disk, for the run that goes on.
        """
        self.is_here = False
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        again = next((address for address in _again if f"{self.path}/".startswith(f"{address}/")), None)
        if self._place is None or keep:
            return
        if again is None:
            _remove(self._place)
        else:
            _again[again].add(self._place)

    def _open(self) -> int:
        """A file for it: the one that is there, a new one, or one without a name that ends with the process."""
        size = self.size + _MARK.size * len(range(0, self.size, lanes.PIECE))
        home = folder()
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            _tidy(home)
            if self._is_dated:  # a date may come back with other bytes
                raise PermissionError("not to be found by another run")
            self._place = home / self._name
            file = os.open(self._place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            _refuse_others(file)
        except OSError:
            self._place = None
            home, file = _unnamed(home)
        self._file = file
        taken = os.fstat(file).st_blocks * 512
        if shutil.disk_usage(home).free < max(size - taken, 0) + _SPARE:
            raise OSError("too little room")
        os.ftruncate(file, size)
        return file

    def _mark_at(self, start: int) -> int:
        return self.size + _MARK.size * (start // lanes.PIECE)

    def _is_sound(self, file: int, start: int) -> bool:
        """Whether a piece is here as it came."""
        checksum, turned = _MARK.unpack(os.pread(file, _MARK.size, self._mark_at(start)))
        if checksum != turned ^ 0xFFFFFFFF:
            return False
        found, stop = 0, min(start + lanes.PIECE, self.size)
        for place in range(start, stop, _BLOCK):
            found = zlib.crc32(os.pread(file, min(_BLOCK, stop - place), place), found)
        return found == checksum

    def _is_still(self, file: int, start: int) -> bool:
        """Whether bytes in the middle of a piece that is here are those that the server has now."""
        stop = min(start + lanes.PIECE, self.size)
        place = start + max(stop - start - _SAMPLE, 0) // 2
        now = bytearray(min(_SAMPLE, stop - place))
        return self._fetch(self.start + place, now) == len(now) and os.pread(file, len(now), place) == now

    def _fetched(self, file: int, start: int) -> bool:
        """Fetch a piece and mark it; False where the file ends in it."""
        piece = _Piece(file, start, min(lanes.PIECE, self.size - start))
        if self._fetch(self.start + start, piece) < len(piece):
            return False
        os.pwrite(file, _MARK.pack(piece.checksum, piece.checksum ^ 0xFFFFFFFF), self._mark_at(start))
        return True


class _Piece:
    """A piece to those who fetch it: a buffer, which is written to the disk as it is filled from front to end."""

    def __init__(self, file: int, place: int, size: int) -> None:
        self._file, self._place, self._size, self._filled = file, place, size, 0
        self.checksum = 0

    def __len__(self) -> int:
        return self._size

    def __setitem__(self, part: slice, content: bytes) -> None:
        assert part.start in (None, self._filled), "bytes come one after the other"
        rest = memoryview(content)
        while rest:
            count = os.pwrite(self._file, rest, self._place + self._filled)
            self._filled, self.checksum = self._filled + count, zlib.crc32(rest[:count], self.checksum)
            rest = rest[count:]


def _unnamed(home: Path) -> tuple[Path, int]:
    """A file that ends with the process, and the folder on whose disk it is: this one, or that for temporary files."""
    for folder in (home, Path(tempfile.gettempdir())):
        with suppress(OSError), tempfile.TemporaryFile(buffering=0, dir=folder) as unnamed:
            return folder, os.dup(unnamed.fileno())
    raise OSError("no folder can be written to")


def _refuse_others(file: int) -> None:
    """Close what is no plain file of this user alone: its bytes could be anybody's, and change while they are read.

    Raises:
        PermissionError: it is none.
    """
    said = os.fstat(file)
    if not stat.S_ISREG(said.st_mode) or said.st_uid != os.geteuid() or said.st_nlink != 1 or said.st_mode & 0o022:
        os.close(file)
        raise PermissionError("not this user's own file")


@cache
def _tidy(home: Path) -> None:
    """Once in a process: remove what killed runs left and nobody came back for."""
    for file in home.iterdir():
        with suppress(OSError):
            if _NAME.fullmatch(file.name) and time.time() - file.lstat().st_mtime > _OLD:
                _remove(file)
