"""Named records on a disk, one safetensors file each, with checksums over all that they say.

    NAME.safetensors    arrays; in one metadata entry: the name, a JSON object, a checksum per array, and one over these

A file is written beside its place and then renamed, so a reader never sees half of one. What does not fit its checksums
counts as not stored. Files from before there were checksums have the JSON object alone and are read as they are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import socket
import stat
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import numpy as np

from spectra.errors import SourceError, StoreError
from spectra.files.safetensors_file import read_header
from spectra.files.storage import Disk, Place, Stamp
from spectra.files.tensors import TensorRef
from spectra.printing import strict

ANOTHER_PLACE = "another directory (out=, --out)"
_SUFFIX = ".safetensors"
_LONGEST = 255 - len(_SUFFIX)  # bytes of a file's name, as common file systems have it
_SHORTENED = "%~"  # before the digest of a name that is too long; percent-encoding never writes it
_KEPT = 150  # characters of a shortened name that people can read
_SIGNED = ("name", "record", "sums")
_SAID = "signed"
_ABANDONED = 3600  # seconds after which a partial file of another machine is nobody's
_HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]
_PARTIAL = re.compile(r"\..*\.([A-Za-z0-9]*)-(\d+)\.partial", re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SYNCED_EVERY = 0.2  # seconds
_SMALL = 2**16  # bytes of a file that is read at once
Version = tuple[int, int, int]  # a file's number, size and time: another one after each writing
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_DAMAGE = (OSError, AttributeError, KeyError, ValueError, TypeError, OverflowError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Piece:
    """What one file holds.

    Attributes:
        name: the record's name.
        arrays: those that were asked for.
        record: the JSON object.
        signed: whether it has checksums; False of what an older version stored.
    """

    name: str
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]
    signed: bool


class Shelf:
    """Named records of arrays and a small JSON object, one safetensors file each.

    Args:
        directory: where they lie.
        verify: False takes arrays as they are; what is said of them is always checked.
    """

    def __init__(self, directory: Path, verify: bool = True) -> None:
        self.directory = directory
        self.verify = verify
        self._synced = -math.inf
        self._paths: dict[str, Path] = {}

    def version(self, name: str) -> Version | None:
        """What changes when the record is written again; None where there is none."""
        try:
            return _version(os.stat(self.path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as problem:
            raise StoreError(f"{self.path(name)} cannot be looked at: {problem.strerror}") from None

    def path(self, name: str) -> Path:
        """Where the record lies."""
        if name not in self._paths:  # asked for four times in a run
            self._paths[name] = self.directory / f"{_file_name(name)}{_SUFFIX}"
        return self._paths[name]

    def files(self) -> list[Path]:
        """Every file that is named as a record is, sound or not."""
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as problem:
            raise StoreError(f"{self.directory} cannot be listed: {problem.strerror}") from None
        return [self.directory / name for name in names if name.endswith(_SUFFIX) and not name.startswith(".")]

    def names(self) -> list[str]:
        """The records that are there, numbers in names in numerical order; a shortened name is read from its file."""
        return sorted(filter(None, map(self.name_of, self.files())), key=_natural)

    def name_of(self, file: Path) -> str | None:
        """The name of the record in a file; None where no record is kept under such a name, or it alone knows it and is
        damaged."""
        stem = file.name.removesuffix(_SUFFIX)
        with suppress(StoreError, UnicodeDecodeError):
            if _SHORTENED in stem:
                return read_piece(file, (), verify=False).name
            return unquote(stem, errors="surrogatepass")
        return None

    def put(self, name: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> Version:
        """Write one record, and say which it is.

        Of many that come quickly only some are waited for until they are on the disk, which takes milliseconds each:
        a process that is killed loses none, a machine without power those of the last seconds, which their checksums
        tell.

        Raises:
            StoreError: the directory cannot be written to.
        """
        from safetensors.numpy import save

        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        sums = {key: _sum(array) for key, array in contiguous.items()}
        said = {"name": json_text(name), "record": json_text(record), "sums": json_text(sums)}
        lasting = time.monotonic() - self._synced > _SYNCED_EVERY
        version = write(self.path(name), save(contiguous, signed(said)), lasting=lasting)
        if lasting:
            self._synced = time.monotonic()
        return version

    def record(self, name: str) -> dict[str, Any]:
        """The JSON object of a record, without its arrays.

        Raises:
            StoreError: the record is missing or damaged.
        """
        return self._piece(name, ()).record

    def get(self, name: str, only: Sequence[str] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays, or these of them, and the JSON object of a record.

        Raises:
            StoreError: the record is missing or damaged.
        """
        piece = self._piece(name, only)
        return piece.arrays, piece.record

    def _piece(self, name: str, only: Sequence[str] | None) -> Piece:
        piece = read_piece(self.path(name), only, verify=self.verify)
        if piece.signed and piece.name != name:
            raise damaged(self.path(name), "it is another record, renamed")
        return piece


def read_piece(path: Path, only: Sequence[str] | None = None, *, verify: bool = True) -> Piece:
    """What a file holds, if it fits its checksums.

    Args:
        path: the file.
        only: which arrays; None for all. Those that are not read are not checked.
        verify: False takes arrays as they are.

    Raises:
        StoreError: it is missing or damaged.
    """
    try:
        header = read_header(_opened_to_read(path))
        said = dict(header.metadata)
        is_signed = set(said) != {"record"}
        if is_signed:
            said = json.loads(said[_SAID])
            if said.pop("checksum", None) != _signature(said):
                raise ValueError("its checksum does not fit what it says")
        sums = json.loads(said["sums"]) if is_signed else {}
        if header.broken or (is_signed and set(header.tensors) != set(sums)):
            raise ValueError("it does not hold the arrays that it lists")
        arrays = {key: _array(ref) for key, ref in header.tensors.items() if only is None or key in only}
        record = json.loads(said["record"], parse_int=number_of)
        for key, array in arrays.items():
            if verify and is_signed and _sum(array) != sums[key]:
                raise ValueError(f"the checksum of {key} does not fit its numbers")
        if not isinstance(record, dict):
            raise ValueError("it holds no record")
        name = json.loads(said["name"]) if is_signed else ""
        return Piece(name, arrays, record, is_signed)
    except (*_DAMAGE, SourceError) as problem:
        raise damaged(path, str(problem) or type(problem).__name__) from None


def number_of(digits: str) -> int | float:
    """A whole number of JSON as int64 where that holds it, else as float64: numpy's functions know no other.

    >>> number_of("-7"), number_of("1" + 30 * "0")
    (-7, 1e+30)
    """
    return int(digits) if len(digits) < 19 else float(digits)


@dataclass(frozen=True)
class _Held(Disk):
    """One small file, all of it read at once: for thousands of them, opening each thrice is what takes the time."""

    content: bytes
    modified: int

    def stamp(self, path: str) -> Stamp:
        """Its size as it was read, and its time."""
        return len(self.content), self.modified

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """As `Storage.read_into`."""
        part = self.content[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


def _opened_to_read(path: Path) -> Place:
    """The file: read, and not mapped, since a map of a file that is cut off kills the process."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise FileNotFoundError("no such file")
    if status.st_size > _SMALL:
        return Place.of(path)
    with open(path, "rb", buffering=0) as file:
        return Place(_Held(file.read(), status.st_mtime_ns), str(path))


def _array(ref: TensorRef) -> np.ndarray:
    """The stored entries."""
    content = ref.file.read(ref.offset, ref.bytes_read)
    return np.frombuffer(content, _NUMPY[ref.dtype]).reshape(ref.stored)


def damaged(path: Path, why: str) -> StoreError:
    """What to say of a file that is not what was stored."""
    return StoreError(
        f"{path} is missing or damaged ({why}); the same run again computes it anew, and nothing else has to be"
    )


def sum_of(content: bytes) -> str:
    """BLAKE2b of a file's bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _sum(array: np.ndarray) -> str:
    """CRC-32 of an array's bytes, with its type and shape."""
    data = np.ascontiguousarray(array)
    shape = ",".join(map(str, array.shape))
    return f"{data.dtype.str}({shape}):{zlib.crc32(data.reshape(-1).view(np.uint8).data):08x}"


def signed(said: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a record: one entry, for several come in no order, and equal results are equal bytes."""
    return {_SAID: json.dumps({**said, "checksum": _signature(said)})}


def _signature(said: Mapping[str, str]) -> str:
    """BLAKE2b of what the metadata say; the lengths keep the end of one from being the start of the next."""
    digest = hashlib.blake2b(digest_size=16)
    for key in _SIGNED:
        content = said[key].encode()
        digest.update(f"{key}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _file_name(name: str) -> str:
    """A name as a file's; one that is too long is cut, with its digest.

    >>> _file_name("a/b[q].weight"), len(_file_name("x" * 1000))
    ('a%2Fb[q].weight', 184)
    """
    quoted = quote(name, safe="[]", errors="surrogatepass")
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) <= _LONGEST:
        return quoted
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{quoted[:_KEPT]}{_SHORTENED}{digest}"


def write(path: Path, content: bytes, *, lasting: bool = True) -> Version:
    """Put a file in its place in one step.

    Args:
        path: its place; folders above it are made.
        content: what it holds.
        lasting: wait until it is on the disk.

    Raises:
        StoreError: it cannot be written; what was there before is as it was.
    """
    partial = f"{path.parent}/.{path.name[-100:]}.{_HOST}-{os.getpid()}.partial"
    _sweep_once(path.parent)
    try:
        with _opened(partial) as file:
            try:
                file.write(content)
                file.flush()
                if lasting:
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(partial)
                raise
            return _version(os.fstat(file.fileno()))
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        full = isinstance(problem, OSError) and problem.errno in _FULL
        why = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise StoreError(
            f"{path} cannot be written ({why}); what was stored before is unharmed: "
            f"{'make room' if full else 'let this user write there'} or choose {ANOTHER_PLACE}, "
            "and run the same again to go on"
        ) from None


def _opened(partial: str) -> BinaryIO:
    """A new file, in a folder that is made if it is not there."""
    try:
        return open(partial, "wb")
    except FileNotFoundError:
        os.makedirs(os.path.dirname(partial), exist_ok=True)
        return open(partial, "wb")


def _version(status: os.stat_result) -> Version:
    return (status.st_ino, status.st_size, status.st_mtime_ns)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold a directory against other processes while what is in it is looked at and claimed; made where it is not.

    Where the system has no such lock, or the file system none, nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = None
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def sweep(directory: Path) -> None:
    """Remove the partial files that killed processes left: of this machine at once, of others when they are old."""
    for folder in (directory, directory / "spectra", directory / "similarity"):
        _sweep(folder)


@cache
def _sweep_once(folder: Path) -> None:
    """The same of any folder that this process writes into: figures, pages and tables leave partial files, too."""
    _sweep(folder)


def _sweep(folder: Path) -> None:
    with suppress(OSError):
        for file in [folder / name for name in os.listdir(folder) if name.endswith(".partial")]:
            if _is_abandoned(file):
                file.unlink(missing_ok=True)


def _is_abandoned(partial: Path) -> bool:
    match = _PARTIAL.fullmatch(partial.name)
    if not match:
        return False  # another program's
    if match[1] == _HOST:
        try:
            os.kill(int(match[2]), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False  # another user's
        return False
    return time.time() - partial.stat().st_mtime > _ABANDONED


def json_text(content: Any, indent: int | None = None) -> str:
    """Strict JSON, readable; half a surrogate pair is escaped, since no UTF-8 holds it.

    >>> json_text({"σ": float("nan"), "name": chr(0xD800)})
    '{"σ": null, "name": "\\\\ud800"}'
    """
    text = json.dumps(strict(content), indent=indent, allow_nan=False, ensure_ascii=False)
    return text if text.isascii() else re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in names in numerical order, however many digits they have."""
    pieces = re.split(r"([0-9]+)", name)
    numbers = [piece.lstrip("0") for piece in pieces]
    return [(len(numbers[i]), numbers[i]) if i % 2 else (-1, piece) for i, piece in enumerate(pieces)]
