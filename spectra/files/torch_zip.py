"""The zip archive that `torch.save` writes, read without torch: its pickle as plain data, tensors as ranges of bytes.

Reference: PyTorch's documentation of the serialised file format (Serialization semantics).
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from spectra.errors import SourceError
from spectra.files import limits
from spectra.files.dtypes import DTYPE_OF_TORCH, DTYPES
from spectra.files.inert_pickle import Inert, load, named, sizes_of
from spectra.files.storage import Place, Stamp

_PARAMETER = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_TENSOR = ("_rebuild_tensor_v2", "_rebuild_tensor_v3")  # the second names its type beside a storage of bytes
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, EOFError, NotImplementedError, RuntimeError, OSError,
    AssertionError, MemoryError, OverflowError, IndexError,
)  # fmt: skip
_OF_STORAGE = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip


@dataclass(frozen=True)
class Lying:
    """A tensor whose entries lie in a file as they are.

    Attributes:
        file: which.
        stamp: its version.
        name: the tensor's.
        dtype: its type, in safetensors' words.
        stored: its shape.
        offset: where the bytes begin.
        steps: from one entry to the next along each axis; None where all lie one after the other in row-major order.
        marks: "conj" and "neg" of a tensor that stands for the conjugate, or the negative, of what is stored.
    """

    file: Place
    stamp: Stamp
    name: str
    dtype: str
    stored: tuple[int, ...]
    offset: int
    steps: tuple[int, ...] | None = None
    marks: tuple[str, ...] = ()

    @property
    def extent(self) -> int:
        """How many entries lie from the first to the last."""
        if not math.prod(self.stored) or self.steps is None:
            return math.prod(self.stored)
        return 1 + sum((size - 1) * step for size, step in zip(self.stored, self.steps, strict=True))


@lru_cache(maxsize=4)
def placed(file: Place, stamp: Stamp) -> Mapping[str, Lying]:
    """Name → where the entries lie, of the tensors of a state dict in an archive; {} of another file.

    What is read from there is not mapped: a file that is cut off under a run is a message, and not the process's end.

    Args:
        file: where it is, on this machine.
        stamp: the version that is meant.
    """
    try:
        archive = Archive(file)
        content, _ = unwrapped(archive.content())
    except SourceError:
        return {}
    found = {}
    for name, value in content.items() if isinstance(content, Mapping) and archive.stamp == stamp else ():
        tensor = value.args[0] if named(value) in _PARAMETER and value.args else value
        if named(tensor) in _TENSOR:
            with suppress(SourceError):
                found[str(name)] = archive.spread(str(name), tensor)
    return found


def unwrapped(content: Any) -> tuple[Any, list[tuple[str, Mapping[Any, Any]]]]:
    """The state dict among what a file holds, and the keys that it was found behind, each with what is around it.

    >>> unwrapped({"model": {"a.weight": 1}, "step": 3})[0]
    {'a.weight': 1}
    """
    whole = content.get("state") if isinstance(content, Mapping) else None
    if isinstance(whole, Mapping) and isinstance(whole.get("model"), Mapping):  # Composer's training state
        content = whole
    around: list[tuple[str, Mapping[Any, Any]]] = []
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            around.append((wrapper, content))
            content = content[wrapper]
    return content, around


class Archive:
    """A zip archive of torch: a pickle, and one record of bytes for each storage."""

    def __init__(self, file: Place) -> None:
        self.file = file
        self.stamp: Stamp = file.stamp()
        try:
            self._zip = zipfile.ZipFile(file.open())
            self._records = {info.filename: info for info in self._zip.infolist()}
        except _DAMAGED_ZIP as problem:
            raise SourceError(f"{file} is damaged or no torch archive ({problem}); download or save it again") from None
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise SourceError(f"{file} is a zip archive without one data.pkl, so not what torch.save writes")
        self._home = pickles[0].removesuffix("data.pkl")

    def content(self) -> Any:
        """The pickle as plain data; a storage is the tuple that names it."""
        if self._home + "byteorder" in self._records and self._read("byteorder") != b"little":
            raise SourceError(f"{self.file} was saved on a big-endian machine; save it again on a little-endian one")
        return load(self._read("data.pkl"), str(self.file), persistent=lambda key: key)

    def _read(self, name: str) -> bytes:
        record = self._records[self._home + name]
        if record.file_size > limits.PICKLE or record.compress_type != zipfile.ZIP_STORED:
            raise SourceError(f"{self.file}: its {name} is too large or compressed; save it again with torch.save")
        try:
            return self._zip.read(record)
        except _DAMAGED_ZIP as problem:
            raise SourceError(f"{self.file} is damaged ({problem}); download or save it again") from None

    def lying(self, name: str, value: Inert) -> Lying:
        """A tensor whose entries lie one after the other in a record of the archive."""
        found = self.spread(name, value)
        if found.steps is not None or found.marks:
            raise SourceError(f"{name} in {self.file} does not lie in row-major order; save it with .contiguous()")
        return found

    def spread(self, name: str, value: Inert) -> Lying:
        """A tensor whose entries lie in a record of the archive, in whatever order."""
        where = f"{name} in {self.file}"
        try:
            (_, storage, key, _, count), offset, size, stride = value.args[:4]
        except (TypeError, ValueError):
            raise SourceError(f"{where} has no storage; save it again") from None
        dtype, shape, steps = _OF_STORAGE.get(named(storage)), sizes_of(size), sizes_of(stride)
        marks = value.args[6:7]
        if named(value) == "_rebuild_tensor_v3":
            dtype, marks = DTYPE_OF_TORCH.get(named(value.args[6])) if marks else None, value.args[7:8]
        if dtype is None:
            raise SourceError(f"{where} has a {named(storage) or 'storage'} of unknown type; save plain tensors")
        if (
            shape is None
            or steps is None
            or len(steps) != len(shape)
            or type(offset) is not int
            or offset < 0
            or type(count) is not int
        ):
            raise SourceError(f"{where} has no readable shape; save it again")
        width = DTYPES[dtype][1]
        in_bytes = named(storage) == "UntypedStorage"
        found = Lying(
            self.file, self.stamp, name, dtype, shape, offset * width,
            None if not math.prod(shape) or _is_contiguous(shape, steps) else steps, _marks_of(marks),
        )  # fmt: skip
        there = count // width if in_bytes else count
        if math.prod(shape) and (offset + found.extent > there or math.prod(shape) > there):
            raise SourceError(f"{where} has fewer entries than its shape {list(shape)}; save it again")
        start = self._data(where, key, count if in_bytes else count * width) if math.prod(shape) else 0
        return replace(found, offset=start + offset * width)

    def _data(self, where: str, key: Any, size: int) -> int:
        """Where the bytes of a storage of this size begin in the file."""
        record = self._records.get(f"{self._home}data/{key}")
        if record is None or record.compress_type != zipfile.ZIP_STORED or record.file_size != size:
            raise SourceError(f"{where}: the archive does not hold its entries as they are; save it again")
        head = self.file.read(record.header_offset, 30)  # the local header: its name and extra field vary in length
        start = (
            record.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        )
        if not head.startswith(b"PK\x03\x04") or start + size > self.stamp[0]:
            raise SourceError(f"{where}: the archive is damaged; download or save it again")
        return start


def _marks_of(metadata: Sequence[Any]) -> tuple[str, ...]:
    """What a tensor's pickle says of how its entries stand for it."""
    said = metadata[0] if metadata else None
    return tuple(mark for mark in ("conj", "neg") if isinstance(said, Mapping) and said.get(mark))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for size, given in zip(reversed(shape), reversed(stride), strict=False):
        if size > 1 and given != step:
            return False
        step *= size
    return len(shape) == len(stride)
