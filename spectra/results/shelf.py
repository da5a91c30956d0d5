"""Named records on a disk, with checksums over all that they say: a safetensors file each, or many in a pack.

    NAME.safetensors    arrays; in one metadata entry: the name, a JSON object, a checksum per array, and one over these
    small.pack          small ones where there are many, see `spectra.results.pack`; a record's own file counts first

A file is written beside its place and then renamed, so a reader never sees half of one. What does not fit its checksums
counts as not stored. Files from before there were checksums have the JSON object alone and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from spectra.errors import SourceError, StoreError
from spectra.files.safetensors_file import read_header
from spectra.files.storage import Disk, Place, Stamp
from spectra.files.tensors import TensorRef
from spectra.printing import strict
from spectra.results.pack import Pack, read_spot, scan
from spectra.results.writing import Version, damaged, version_of, write

_SUFFIX = ".safetensors"
_LONGEST = 255 - len(_SUFFIX)  # bytes of a file's name, as common file systems have it
_SHORTENED = "%~"  # before the digest of a name that is too long; percent-encoding never writes it
_KEPT = 150  # characters of a shortened name that people can read
_SIGNED = ("name", "record", "sums")
_SAID = "signed"
_SYNCED_EVERY = 0.2  # seconds
_AT_ONCE = 2**16  # bytes of a file that is read at once
_SMALL = 2**14  # bytes of arrays that a pack takes: what is larger took its time to compute, and may have its own file
_MANY = 256  # so many records have files of their own, as people can open them, before small ones go into a pack
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
    """Named records of arrays and a small JSON object.

    Args:
        directory: where they lie.
        verify: False takes arrays as they are; what is said of them is always checked.
        packs: whether small records of many are kept together; whoever says so calls `seal` at the end.

    """

    def __init__(self, directory: Path, verify: bool = True, *, packs: bool = False) -> None:
        self.directory = directory
        self.verify = verify
        self._many = False
        self._packs = packs
        self._pack = Pack(directory)
        self._own: set[str] | None = None
        self._added = 0
        self._synced = -math.inf
        self._paths: dict[str, Path] = {}

    def expect(self, records: int) -> None:
        """Say how many there will be: where they are many, small ones need not have files of their own first."""
        self._many = records > _MANY

    def version(self, name: str) -> Version | bytes | None:
        """What changes when the record is written again; None where there is none."""
        if self.is_packed(name):
            return self._pack.spots[name].digest
        try:
            return version_of(os.stat(self.path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as problem:
            raise StoreError(f"{self.path(name)} cannot be looked at: {problem.strerror}") from None

    def path(self, name: str) -> Path:
        """The record's own file, if it has one."""
        if name not in self._paths:  # asked for four times in a run
            self._paths[name] = self.directory / f"{_file_name(name)}{_SUFFIX}"
        return self._paths[name]

    def where(self, name: str) -> Path:
        """The file that the record is in."""
        return self._pack.spots[name].file if self.is_packed(name) else self.path(name)

    def is_packed(self, name: str) -> bool:
        """Whether it is in a pack, as far as is known, and has no file of its own."""
        own = self._own_files()
        return name in self._pack.spots and (not own or self.path(name).name not in own)

    def _own_files(self) -> set[str]:
        if self._own is None:
            self._own = {file.name for file in self.files()}
        return self._own

    def files(self) -> list[Path]:
        """Every file that is named as a single record's is, sound or not."""
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as problem:
            raise StoreError(f"{self.directory} cannot be listed: {problem.strerror}") from None
        return [self.directory / name for name in names if name.endswith(_SUFFIX) and not name.startswith(".")]

    def packs(self) -> list[Path]:
        """Every file that holds several records, sound or not."""
        return self._pack.files()

    @property
    def is_empty(self) -> bool:
        """Whether there is no file of records, sound or not."""
        return not self.files() and not self.packs()

    def sound(self) -> Iterator[Piece]:
        """Every piece that fits its checksums, without its arrays."""
        for file in self.files():
            with suppress(StoreError):
                yield read_piece(file, ())
        for file in self.packs():
            yield from (piece for _, piece in read_pack(file, ())[0] if piece is not None)

    def faults(self) -> list[str]:
        """What in packs is no sound record, in words; which records those were is not known."""
        return self._pack.faults

    def names(self) -> list[str]:
        """The records that are there now, numbers in names in numerical order; shortened names are read from files."""
        self._pack.look_again()
        files = self.files()
        self._own = {file.name for file in files}
        return sorted({*filter(None, map(self.name_of, files)), *self._pack.spots}, key=natural)

    def seal(self) -> None:
        """Bring the small records in order: one pack instead of what this run, or killed ones, have added.

        Raises:
            StoreError: it cannot be written; what was there before is as it was.
        """
        self._pack.look_again()
        if self._pack.is_open():
            self._pack.seal(natural)

    def name_of(self, file: Path) -> str | None:
        """The name of the record in its own file; None where no record is kept under such a name, or the file alone
        knows it and is damaged."""
        stem = file.name.removesuffix(_SUFFIX)
        with suppress(StoreError, UnicodeDecodeError):
            if _SHORTENED in stem:
                return read_piece(file, (), verify=False).name
            return unquote(stem, errors="surrogatepass")
        return None

    def put(self, name: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> Version | bytes:
        """Write one record, and say which it is.

        Of many that come quickly only some are waited for until they are on the disk, which takes milliseconds each:
        a process that is killed loses none, a machine without power those of the last seconds, which their checksums
        tell.

        Raises:
            StoreError: the directory cannot be written to.
        """
        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        sums = {key: _sum(array) for key, array in contiguous.items()}
        size = sum(array.nbytes for array in contiguous.values())
        self._added += 1
        many = self._many or self._added > _MANY
        if self._packs and many and size <= _SMALL and self.path(name).name not in self._own_files():
            text = json_text({"record": record, "sums": sums}).encode()
            return self._pack.add(name, text, b"".join(array.tobytes() for array in contiguous.values()))
        return self._put_alone(name, contiguous, {"record": json_text(record), "sums": json_text(sums)})

    def amend(self, name: str, said: Mapping[str, Any]) -> bytes:
        """Store a record of a pack again with these entries, its arrays as they are, and say which it is.

        Raises:
            StoreError: it is damaged, or the directory cannot be written to.
        """
        text, data = self._pack.read(name)
        try:
            stored = _DECODER.decode(text.decode())
            stored["record"] |= said
        except _DAMAGE as problem:
            raise damaged(self.where(name), f"{name}: {str(problem) or type(problem).__name__}") from None
        return self._pack.add(name, json_text(stored).encode(), data)

    def _put_alone(self, name: str, arrays: dict[str, np.ndarray], said: dict[str, str]) -> Version:
        from safetensors.numpy import save

        lasting = time.monotonic() - self._synced > _SYNCED_EVERY
        content = save(arrays, signed({"name": json_text(name), **said}))
        version = write(self.path(name), content, lasting=lasting)
        if lasting:
            self._synced = time.monotonic()
        if self._own is not None:
            self._own.add(self.path(name).name)
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
        if self.is_packed(name):
            try:
                return _piece_of(name, *self._pack.read(name), only, verify=self.verify)
            except _DAMAGE as problem:
                raise damaged(self.where(name), f"{name}: {str(problem) or type(problem).__name__}") from None
        if self._pack.faults and self.path(name).name not in self._own_files():
            raise damaged(self._pack.path, f"{name} is lost")
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


def _piece_of(name: str, text: bytes, data: bytes, only: Sequence[str] | None, *, verify: bool) -> Piece:
    """What a record of a pack holds.

    Raises:
        ValueError: an array does not fit its checksum.
    """
    said = _DECODER.decode(text.decode())
    arrays: dict[str, np.ndarray] = {}
    place = 0
    for key, checksum in said["sums"].items():
        kind, shape = checksum.split(":")[0].removesuffix(")").split("(")
        sizes = [int(size) for size in shape.split(",") if size]
        array = np.frombuffer(data, kind, math.prod(sizes), place).reshape(sizes)
        place += array.nbytes
        if only is None or key in only:
            arrays[key] = array
            if verify and _sum(array) != checksum:
                raise ValueError(f"the checksum of {key} does not fit its numbers")
    if not isinstance(said["record"], dict):
        raise ValueError("it holds no record")
    return Piece(name, arrays, said["record"], signed=True)


def read_pack(path: Path, only: Sequence[str] | None = None) -> tuple[Iterator[tuple[str, Piece | None]], str]:
    """Name and content of every record in a pack, None of a damaged one; and what is wrong with the rest, if it is.

    Args:
        path: the pack.
        only: as for `read_piece`.
    """
    spots, fault = scan(path)

    def pieces() -> Iterator[tuple[str, Piece | None]]:
        for name, spot in spots.items():
            try:
                yield name, _piece_of(name, *read_spot(spot), only, verify=True)
            except _DAMAGE:
                yield name, None

    return pieces(), fault


def number_of(digits: str) -> int | float:
    """A whole number of JSON as int64 where that holds it, else as float64: numpy's functions know no other.

    >>> number_of("-7"), number_of("1" + 30 * "0")
    (-7, 1e+30)
    """
    return int(digits) if len(digits) < 19 else float(digits)


_DECODER = json.JSONDecoder(parse_int=number_of)


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
    if status.st_size > _AT_ONCE:
        return Place.of(path)
    with open(path, "rb", buffering=0) as file:
        return Place(_Held(file.read(), status.st_mtime_ns), str(path))


def _array(ref: TensorRef) -> np.ndarray:
    """The stored entries."""
    content = ref.file.read(ref.offset, ref.bytes_read)
    return np.frombuffer(content, _NUMPY[ref.dtype]).reshape(ref.stored)


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


def json_text(content: Any, indent: int | None = None) -> str:
    """Strict JSON, readable; half a surrogate pair is escaped, since no UTF-8 holds it.

    >>> json_text({"σ": float("nan"), "name": chr(0xD800)})
    '{"σ": null, "name": "\\\\ud800"}'
    """
    try:
        text = json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError):
        text = json.dumps(strict(content), indent=indent, allow_nan=False, ensure_ascii=False)
    return text if text.isascii() else re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


@lru_cache(2**15)  # names are put in order several times in a run
def natural(name: str) -> list[tuple[int, str]]:
    """Numbers in names in numerical order, however many digits they have."""
    pieces = re.split(r"([0-9]+)", name)
    numbers = [piece.lstrip("0") for piece in pieces]
    return [(len(numbers[i]), numbers[i]) if i % 2 else (-1, piece) for i, piece in enumerate(pieces)]
