"""The header of one GGUF file (llama.cpp).

The `gguf` package's reader maps the file and parses every vocabulary entry; here the header is read once,
bounded by the file's size, and arrays are skipped. Format: the GGUF specification, version 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from spectra.errors import SourceError
from spectra.files import ggml, limits
from spectra.files.header import Header
from spectra.files.storage import Place, Stamp
from spectra.files.tensors import TensorRef

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_AXES, _MAX_DEPTH = 8, 4
_MAX_KEY = 2**16  # bytes; the specification's own limit
_DOWNLOAD_AGAIN = "download it again"


def read_header(place: Place) -> Header:
    """The tensors under llama.cpp's names, axes in PyTorch's order, and the metadata without its arrays.

    Raises:
        SourceError: it is not a GGUF file, or its header contradicts itself.
        MissingExtraError: a tensor is quantised and the `gguf` package is not installed.
    """
    stamp = place.stamp()
    with place.open() as file:
        head = file.read(4)
        if head.startswith(b"vers"):
            raise SourceError(f"{place} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        if head != MAGIC:
            raise SourceError(f"{place} is not a GGUF file; {_DOWNLOAD_AGAIN}")
        cursor = _Cursor(file, place, stamp[0])
        version = cursor.number("I")
        if version not in (2, 3):
            raise SourceError(f"{place} is GGUF version {version}; versions 2 and 3 are read; convert it again")
        tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
        cursor.bound(tensor_count, limits.TENSORS, "tensors")
        cursor.bound(value_count, limits.METADATA, "metadata values")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.text(_MAX_KEY)
            values[key] = cursor.value(cursor.number("I"))
        table = [_Entry.read(cursor) for _ in range(tensor_count)]
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0:
            raise SourceError(f"{place}: general.alignment = {alignment!r} is not a size; {_DOWNLOAD_AGAIN}")
        start = -(-file.tell() // alignment) * alignment
    return _checked(place, stamp, start, values, table)


@dataclass(frozen=True)
class _Entry:
    """One line of the tensor table."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @classmethod
    def read(cls, cursor: _Cursor) -> _Entry:
        name, axes = cursor.text(_MAX_KEY), cursor.number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise SourceError(f"{cursor.place}: {name!r} has {axes} axes; {_DOWNLOAD_AGAIN}")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        return cls(name, shape, cursor.number("I"), cursor.number("Q"))


def _checked(place: Place, stamp: Stamp, start: int, values: dict[str, Any], table: list[_Entry]) -> Header:
    header = Header(metadata=values)
    for entry in table:
        name, shape, begin = entry.name, entry.shape, start + entry.offset
        if name in header.tensors or name in header.broken:
            raise SourceError(f"{place} names {name!r} twice; {_DOWNLOAD_AGAIN}")
        dtype = ggml.type_name(entry.type)
        size = None if dtype is None else ggml.array_bytes(dtype, shape)
        if dtype is None or size is None:
            header.broken[name] = f"type {dtype or entry.type} of {list(shape)} in {place} is not known here"
        elif begin + size > stamp[0]:
            why = f"{place} is truncated: {stamp[0]} of at least {begin + size} bytes; {_DOWNLOAD_AGAIN}"
            header.broken[name] = why
        else:
            header.tensors[name] = TensorRef(
                place.path, name, dtype, shape, "gguf", stamp, place.storage, begin, stored=shape
            )
    return header


@dataclass
class _Cursor:
    """Reads the header's primitives and stops at the end of the file."""

    file: BinaryIO
    place: Place
    size: int
    items: int = 0

    def bound(self, count: int, limit: int, what: str) -> None:
        """Refuse a count that is absurd, before anything is made of it."""
        if count > limit:
            raise SourceError(f"{self.place}: its header {limits.too_many(count, limit, what)}; {_DOWNLOAD_AGAIN}")

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise SourceError(f"{self.place} is truncated: its header runs past the end; {_DOWNLOAD_AGAIN}")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, limit: int = limits.TEXT) -> str:
        length = self.number("Q")
        self.bound(length, limit, "bytes of one string")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A metadata value; None for an array, which is skipped."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise SourceError(f"{self.place}: a metadata value has the unknown type {kind}; {_DOWNLOAD_AGAIN}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take_nothing(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        self.items += count
        self.bound(self.items, limits.ITEMS, "entries of lists")
        for _ in range(count):
            if inner == _STRING:
                self.take_nothing(self.number("Q"))
            else:
                self.value(inner, depth + 1)
        return None

    def take_nothing(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise SourceError(f"{self.place} is truncated: its header runs past the end; {_DOWNLOAD_AGAIN}")
        self.file.seek(count, 1)
