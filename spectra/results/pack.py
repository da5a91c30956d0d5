"""Small records in one file, one behind the other: where there are thousands, a file for each is what takes the time.

    small.pack                all of them in the order of their names, and an end that counts them
    small.HOST-PROCESS-N.log  those that a process has added since, as they came

A record is a mark, three lengths, a checksum of what follows but the arrays, which have their own; then a name, a text
and the arrays' bytes. Each is appended in one write before it counts as stored: a killed process loses none, and may
leave a part of one behind the last. Damage costs the record that it strikes; the next mark tells where to go on.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from spectra.results.writing import HOST, damaged, is_left, not_written, version_of, write

PACK = "small.pack"
_LOG = re.compile(r"small\.([A-Za-z0-9]*)-(\d+)-\d+\.log")
_MARK, _END = b"\x93spectr1", b"\x93spectr."
_HEAD = struct.Struct("<8s3I16s")
_MOST = 2**22  # bytes of a record; a length beyond is damage
_BLOCK = 2**12  # bytes that are searched for a mark at once
_TRIED = 16  # times a file's size, and as much as a record's, is read where there are marks and no records
_SYNCED_EVERY = 1.0  # seconds
_LOOKED_AT = 256  # MiB
_SETTLES = 2 * 10**9  # nanoseconds: file systems tell times of writing apart by this at worst
_MOST_KNOWN = 2


class Spot(NamedTuple):
    """Where a record lies.

    Attributes:
        file: the pack or a log.
        start: its first byte there.
        lengths: bytes of its name, its text and its arrays.
        digest: of its name and text, which hold the checksums of its arrays: other content, another digest.
    """

    file: Path
    start: int
    lengths: tuple[int, int, int]
    digest: bytes

    @property
    def size(self) -> int:
        """Its bytes in all."""
        return _HEAD.size + sum(self.lengths)


class Pack:
    """The small records of one directory: those in its pack, and what was added since.

    Args:
        directory: where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / PACK
        self._scanned: tuple[dict[str, Spot], list[str]] | None = None
        self._readers: dict[Path, _Reader] = {}
        self._log: _Log | None = None

    @property
    def spots(self) -> dict[str, Spot]:
        """Name → where the newest record of that name is."""
        return self._scan()[0]

    @property
    def faults(self) -> list[str]:
        """What of the files is no record, in words."""
        return self._scan()[1]

    def files(self) -> list[Path]:
        """The pack and the logs, in the order in which they were written last."""
        logs: list[tuple[int, Path]] = []
        with suppress(OSError):
            for name in os.listdir(self.directory):
                if _LOG.fullmatch(name):
                    with suppress(OSError):
                        logs.append((os.lstat(self.directory / name).st_mtime_ns, self.directory / name))
        return [self.path] * os.path.lexists(self.path) + [path for _, path in sorted(logs)]

    def look_again(self) -> None:
        """Forget where records were: others may have written since."""
        self._scanned = None
        self._readers.clear()

    def _scan(self) -> tuple[dict[str, Spot], list[str]]:
        if self._scanned is None:
            spots: dict[str, Spot] = {}
            faults: list[str] = []
            for file in self.files():
                found, fault = _scanned(file)
                spots.update(found)
                faults += [fault] * bool(fault)
            self._scanned = spots, faults
        return self._scanned

    def add(self, name: str, text: bytes, data: bytes) -> bytes:
        """Store a record, and give its digest.

        Raises:
            StoreError: it cannot be written; what was there before is as it was.
        """
        if self._log is None or not self._log.is_there():
            self._log = _Log(self.directory)
        spot = self._log.add(name, text, data)
        self.spots[name] = spot
        return spot.digest

    def read(self, name: str) -> tuple[bytes, bytes]:
        """The text and the arrays' bytes of a record.

        Raises:
            StoreError: it is missing or damaged.
        """
        for _ in range(2):  # another process may have put all of them in another place
            spot = self.spots.get(name)
            if spot is None:
                break
            with suppress(ValueError):
                return _parted(self._bytes_of(spot), spot)
            self.look_again()
        raise damaged(self.path, f"{name} is not in it as it was stored")

    def _bytes_of(self, spot: Spot) -> bytes:
        """What lies where a record was, from a file that stays open: of thousands of records, opening takes longest."""
        try:
            if spot.file not in self._readers:
                self._readers[spot.file] = _Reader(spot.file)
            return self._readers[spot.file].read(spot)
        except OSError:
            return b""

    def is_open(self) -> bool:
        """Whether sealing would change anything."""
        return bool(self._done() or self.faults)

    def _done(self) -> list[Path]:
        """The logs to which nobody adds any more once this process has done."""
        mine = self._log.path if self._log else None
        return [file for file in self.files() if file == mine or _is_left(file)]

    def seal(self, order: Callable[[str], Any]) -> None:
        """Make one pack of all records, and remove the logs that nobody writes to any more.

        Whoever calls it keeps other processes from doing the same at once.

        Args:
            order: the sort key of their names.

        Raises:
            StoreError: it cannot be written; what was there before is as it was.
        """
        done = self._done()
        self.look_again()  # only now: whoever is gone adds no more
        if done or self.faults:
            for file in {self.path, *done}:
                _read_through(file)  # what cannot be read now may be sound, and must not be replaced
            if self.spots:
                write(self.path, _packed([(name, self.spots[name]) for name in sorted(self.spots, key=order)]))
            self._log = None
            for file in done:
                file.unlink(missing_ok=True)
            self.look_again()


_AT_WORK: weakref.WeakSet[_Log] = weakref.WeakSet()  # of this process


class _Reader:
    """A file of records that stays open as long as this object is there, whatever becomes of its name."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        weakref.finalize(self, self._file.close)

    def read(self, spot: Spot) -> bytes:
        """The bytes where a record lies; less where the file is shorter."""
        return os.pread(self._file.fileno(), spot.size, spot.start)


class _Log:
    """A file of its own to which this process adds records."""

    def __init__(self, directory: Path) -> None:
        self.path, self._file = _begun(directory)
        weakref.finalize(self, os.close, self._file)
        _AT_WORK.add(self)
        self._length = 0
        self._synced = -_SYNCED_EVERY

    def is_there(self) -> bool:
        """Whether it still has a name: another machine may have taken it for abandoned."""
        return os.fstat(self._file).st_nlink > 0

    def add(self, name: str, text: bytes, data: bytes) -> Spot:
        """Append a record."""
        called = name.encode("utf-8", "surrogatepass")
        lengths = len(called), len(text), len(data)
        digest = _digest(lengths, called + text)
        content = _HEAD.pack(_MARK, *lengths, digest) + called + text + data
        try:
            written = os.write(self._file, content)
            while written < len(content):
                written += os.write(self._file, content[written:])
            if time.monotonic() - self._synced > _SYNCED_EVERY:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as problem:
            with suppress(OSError):
                os.ftruncate(self._file, self._length)
            raise not_written(self.path, problem) from None
        spot = Spot(self.path, self._length, lengths, digest)
        self._length += len(content)
        return spot


def _begun(directory: Path) -> tuple[Path, int]:
    """A log that was not there, opened to append."""
    for number in count(1):
        path = directory / f"small.{HOST}-{os.getpid()}-{number}.log"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
            raise not_written(path, problem) from None
    raise AssertionError


_KNOWN: dict[
    Path, tuple[tuple[int, ...], dict[str, Spot], str]
] = {}  # what packs held that nobody has written to since


def _scanned(path: Path) -> tuple[dict[str, Spot], str]:
    """As `scan`; a pack that is as it was before is not read again, unless it was written just then."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return scan(path)
    version = *version_of(status), status.st_ctime_ns
    if path in _KNOWN and _KNOWN[path][0] == version:
        return _KNOWN[path][1:]
    _KNOWN.pop(path, None)
    settled = time.time_ns() - max(version[2:]) > _SETTLES  # else what is written next may have the same time
    found = scan(path)
    if settled and path.name == PACK and not found[1]:
        while len(_KNOWN) >= _MOST_KNOWN:
            del _KNOWN[next(iter(_KNOWN))]
        _KNOWN[path] = version, *found
    return found


def scan(path: Path) -> tuple[dict[str, Spot], str]:
    """The records in a pack or a log, and what is wrong with the file, "" for nothing.

    A part of a record behind the last of a log is nothing wrong: whoever wrote it was killed.
    """
    spots: dict[str, Spot] = {}
    chain = hashlib.blake2b(digest_size=16)
    counted, gaps, ended = 0, 0, False
    try:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            most = _MOST + _TRIED * size
            place = spent = 0
            while place < size:
                mark, spot, name, tried = _record_at(file, path, place, size)
                if spot is None or ended:
                    spent += _BLOCK + tried
                    following = _next_mark(file, place + 1)
                    gaps += bool(following) or path.name == PACK or size - place > _MOST  # no part of one record
                    if not following or spent > most:
                        break
                    place = following
                    continue
                place += spot.size
                ended = mark == _END
                if ended:
                    gaps += spot.digest != _end(counted, chain)[1]
                else:
                    counted += 1
                    chain.update(spot.digest)
                    spots[name.decode("utf-8", "surrogatepass")] = spot
    except (OSError, ValueError) as problem:
        return spots, str(damaged(path, str(getattr(problem, "strerror", None) or problem)))
    if gaps or (path.name == PACK and not ended):
        return spots, str(damaged(path, f"{counted} of its records are sound, and not all that were stored are there"))
    return spots, ""


def _record_at(file: BinaryIO, path: Path, place: int, size: int) -> tuple[bytes, Spot | None, bytes, int]:
    """The mark, spot and name of the record or the end at a place, and the bytes that were read to see it.

    None for the spot where there is no sound one.
    """
    file.seek(place)
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[: len(_MARK)] not in (_MARK, _END):
        return b"", None, b"", len(head)
    mark, *sizes, digest = _HEAD.unpack(head)
    spot = Spot(path, place, (sizes[0], sizes[1], sizes[2]), digest)
    if spot.size > min(_MOST, size - place):
        return mark, None, b"", len(head)
    said = file.read(sizes[0] + sizes[1])
    if _digest(spot.lengths, said) != digest:
        return mark, None, b"", len(head) + len(said)
    return mark, spot, said[: sizes[0]], len(head) + len(said)


def _next_mark(file: BinaryIO, start: int) -> int:
    """Where the next record or end may begin; 0 where none does within a record's length."""
    for place in range(start, start + _MOST, _BLOCK):  # no more than it takes: marks may stand close together
        file.seek(place)
        block = file.read(_BLOCK + len(_MARK) - 1)  # a mark may lie across two blocks
        places = [found for found in (block.find(_MARK), block.find(_END)) if found >= 0]
        if places:
            return place + min(places)
        if len(block) < _BLOCK:
            break
    return 0


def _packed(records: Sequence[tuple[str, Spot]]) -> Iterator[bytes]:
    """The bytes of a pack, record by record."""
    chain = hashlib.blake2b(digest_size=16)
    for name, spot in records:
        content = _bytes_of(spot)
        if not _is_sound(content, spot):
            raise ValueError(f"{spot.file.name} was changed meanwhile, where it held {name}")
        chain.update(spot.digest)
        yield content
    yield _end(len(records), chain)[0]


def _end(records: int, chain: hashlib.blake2b) -> tuple[bytes, bytes]:
    """What stands behind so many records, and its digest."""
    text = f"{records} {chain.hexdigest()}".encode()
    lengths = 0, len(text), 0
    digest = _digest(lengths, text)
    return _HEAD.pack(_END, *lengths, digest) + text, digest


def _bytes_of(spot: Spot) -> bytes:
    """What lies where a record was; less where the file is gone or shorter."""
    try:
        with open(spot.file, "rb", buffering=0) as file:
            file.seek(spot.start)
            return file.read(spot.size)
    except OSError:
        return b""


def read_spot(spot: Spot) -> tuple[bytes, bytes]:
    """The text and the arrays' bytes of a record.

    Raises:
        ValueError: it is not there any more.
    """
    return _parted(_bytes_of(spot), spot)


def _parted(content: bytes, spot: Spot) -> tuple[bytes, bytes]:
    """The same of bytes that were read there."""
    if not _is_sound(content, spot):
        raise ValueError("it is not there as it was stored")
    text = _HEAD.size + spot.lengths[0]
    return content[text : text + spot.lengths[1]], content[text + spot.lengths[1] :]


def _is_sound(content: bytes, spot: Spot) -> bool:
    """Whether these bytes are the record that was found there."""
    said = content[_HEAD.size : _HEAD.size + spot.lengths[0] + spot.lengths[1]]
    return len(content) == spot.size and _digest(spot.lengths, said) == spot.digest


def _digest(lengths: tuple[int, int, int], said: bytes) -> bytes:
    """BLAKE2b of a record's name and text; the lengths keep the end of one from being the start of the other."""
    return hashlib.blake2b(struct.pack("<3I", *lengths) + said, digest_size=16).digest()


def _opened(path: Path) -> BinaryIO:
    """A regular file, to be read: opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileNotFoundError(0, "no such file")
    return open(path, "rb", buffering=2**18)


def _read_through(path: Path) -> None:
    """Raise a StoreError where there is a file, and it cannot be read; the first 256 MiB stand for a longer one."""
    try:
        with _opened(path) as file:
            for _ in range(_LOOKED_AT):
                if not file.read(2**20):
                    break
    except FileNotFoundError:
        pass
    except OSError as problem:
        if problem.errno != errno.ELOOP:
            raise not_written(path, problem) from None


def _is_left(file: Path) -> bool:
    """Whether nobody adds to a log any more."""
    match = _LOG.fullmatch(file.name)
    if match is not None and (match[1], int(match[2])) == (HOST, os.getpid()):
        return all(log.path != file for log in _AT_WORK)
    try:
        return match is not None and is_left(file, match[1], int(match[2]))
    except OSError:
        return False  # gone meanwhile
