"""Headers and tensors of one GGUF file (llama.cpp): our own header reader, the `gguf` package's decoders.

The package's reader maps the file and parses every vocabulary entry; here the header is read once,
bounded by the file's size, and arrays are skipped. Format: the GGUF specification, version 2 and 3.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spectra.errors import MissingExtraError, SourceError
from spectra.files.tensors import TensorRef, file_stamp

if TYPE_CHECKING:
    from torch import Tensor

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_AXES, _MAX_DEPTH = 8, 4
# Types that need no decoder: ggml's number → (name, torch's name, bytes).
_PLAIN = {
    0: ("F32", "float32", 4), 1: ("F16", "float16", 2), 30: ("BF16", "bfloat16", 2), 28: ("F64", "float64", 8),
    24: ("I8", "int8", 1), 25: ("I16", "int16", 2), 26: ("I32", "int32", 4), 27: ("I64", "int64", 8),
}  # fmt: skip
PLAIN = {name: (torch_name, size) for name, torch_name, size in _PLAIN.values()}
_DOWNLOAD_AGAIN = "download it again"


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data.

    Attributes:
        values: the metadata, arrays of more than a few numbers left out.
        tensors: stored name → reference, axes in PyTorch's order.
        broken: stored name → why it cannot be read.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Parse the metadata and the tensor table.

    Raises:
        SourceError: it is not a GGUF file, or its header contradicts itself.
        MissingExtraError: a tensor is quantised and the `gguf` package is not installed.
    """
    stamp = file_stamp(path)
    with path.open("rb") as file:
        head = file.read(4)
        if head.startswith(b"vers"):
            raise SourceError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        if head != _MAGIC:
            raise SourceError(f"{path} is not a GGUF file; {_DOWNLOAD_AGAIN}")
        cursor = _Cursor(file, path, stamp[0])
        version = cursor.number("I")
        if version not in (2, 3):
            raise SourceError(f"{path} is GGUF version {version}; versions 2 and 3 are read; convert it again")
        tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.text()
            values[key] = cursor.value(cursor.number("I"))
        table = [_Entry.read(cursor) for _ in range(tensor_count)]
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0:
            raise SourceError(f"{path}: general.alignment = {alignment!r} is not a size; {_DOWNLOAD_AGAIN}")
        start = -(-file.tell() // alignment) * alignment
    return _checked(path, stamp, start, values, table)


@dataclass(frozen=True)
class _Entry:
    """One line of the tensor table."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @classmethod
    def read(cls, cursor: _Cursor) -> _Entry:
        name, axes = cursor.text(), cursor.number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise SourceError(f"{cursor.path}: {name!r} has {axes} axes; {_DOWNLOAD_AGAIN}")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        return cls(name, shape, cursor.number("I"), cursor.number("Q"))


def _checked(path: Path, stamp: tuple[int, int], start: int, values: dict[str, Any], table: list[_Entry]) -> Header:
    tensors: dict[str, TensorRef] = {}
    broken: dict[str, str] = {}
    for entry in table:
        if entry.name in tensors or entry.name in broken:
            raise SourceError(f"{path} names {entry.name!r} twice; {_DOWNLOAD_AGAIN}")
        dtype = _type_name(entry.type)
        size = None if dtype is None else stored_bytes(dtype, math.prod(entry.shape))
        if dtype is None or size is None or (dtype not in PLAIN and entry.shape[-1] % _sizes()[dtype][0]):
            broken[entry.name] = f"type {dtype or entry.type} of {list(entry.shape)} in {path} is not known here"
        elif start + entry.offset + size > stamp[0]:
            broken[entry.name] = (
                f"{path} is truncated: {stamp[0]} of at least {start + entry.offset + size} bytes; {_DOWNLOAD_AGAIN}"
            )
        else:
            tensors[entry.name] = TensorRef(
                str(path), entry.name, dtype, entry.shape, "gguf", stamp, start + entry.offset, entry.shape
            )
    return Header(values, tensors, broken)


def stored_bytes(dtype: str, numel: int) -> int | None:
    """The bytes of so many entries; None if they do not fill whole blocks."""
    if dtype in PLAIN:
        return numel * PLAIN[dtype][1]
    block, size = _sizes()[dtype]
    return numel // block * size if numel % block == 0 else None


def read_tensor(ref: TensorRef) -> Tensor:
    """The stored tensor before its views; quantised types are decoded to float32, as llama.cpp does it."""
    import torch

    size = stored_bytes(ref.dtype, math.prod(ref.stored)) or 0
    try:
        with open(ref.path, "rb") as file:
            file.seek(ref.offset)
            data = bytearray(file.read(size))
    except OSError as problem:
        raise SourceError(f"{ref.path} cannot be read: {problem.strerror}") from None
    if len(data) < size:
        raise SourceError(f"{ref.path} ends inside {ref.name}; {_DOWNLOAD_AGAIN}")
    if ref.dtype in PLAIN:
        dtype = getattr(torch, PLAIN[ref.dtype][0])
        return torch.frombuffer(data, dtype=dtype).reshape(ref.stored) if size else torch.empty(ref.stored, dtype=dtype)
    return _decode(ref, data)


def _decode(ref: TensorRef, data: bytearray) -> Tensor:
    import numpy as np
    import torch

    gguf = _package()
    block, size = _sizes()[ref.dtype]
    rows = np.frombuffer(data, np.uint8).reshape(-1, ref.stored[-1] // block * size)
    try:
        decoded = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[ref.dtype])
    except NotImplementedError:
        raise SourceError(f"{ref.name} in {ref.path}: the gguf package does not decode {ref.dtype}") from None
    return torch.from_numpy(np.ascontiguousarray(decoded, dtype=np.float32)).reshape(ref.stored)


def _type_name(number: int) -> str | None:
    if number in _PLAIN:
        return _PLAIN[number][0]
    gguf = _package()
    try:
        name = gguf.GGMLQuantizationType(number).name
    except ValueError:
        return None
    return name if name in _sizes() else None


@lru_cache(maxsize=1)
def _sizes() -> dict[str, tuple[int, int]]:
    """Quantised type → entries and bytes of a block."""
    gguf = _package()
    return {kind.name: (block, size) for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("reading quantised GGUF tensors", "gguf") from None
    return gguf


@dataclass
class _Cursor:
    """Reads the header's primitives and stops at the end of the file."""

    file: BinaryIO
    path: Path
    size: int

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise SourceError(f"{self.path} is truncated: its header runs past the end; {_DOWNLOAD_AGAIN}")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A metadata value; None for an array, which is skipped."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise SourceError(f"{self.path}: a metadata value has the unknown type {kind}; {_DOWNLOAD_AGAIN}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take_nothing(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        for _ in range(count):
            if inner == _STRING:
                self.take_nothing(self.number("Q"))
            else:
                self.value(inner, depth + 1)
        return None

    def take_nothing(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise SourceError(f"{self.path} is truncated: its header runs past the end; {_DOWNLOAD_AGAIN}")
        self.file.seek(count, 1)
