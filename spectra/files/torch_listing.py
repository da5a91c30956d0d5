"""The tensors of a file that `torch.save` wrote as a zip archive, listed without torch, and DTensors among them.

`torch.load` needs a DTensor's own classes, of the version that saved it, and gives a tensor that says it is the whole.
Here the archive's pickle is read as plain data: a plain tensor is a range of bytes of the file, and a DTensor the part
that its rank holds, with its place in the whole.

Reference: PyTorch's documentation of the serialised file format (Serialization semantics) and of
`torch.distributed.tensor`: DTensor, Placement, DeviceMesh.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from spectra.errors import SourceError
from spectra.files import limits
from spectra.files.dtypes import DTYPES
from spectra.files.inert_pickle import Inert, load, named, sizes_of
from spectra.files.storage import Place, Stamp
from spectra.files.tensors import TensorRef

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, EOFError, NotImplementedError, RuntimeError, OSError,
    AssertionError, MemoryError, OverflowError, IndexError,
)  # fmt: skip
_OF_STORAGE = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """How a tensor lies along one axis of the mesh of ranks: "Shard" along its axis `dim`, "Replicate", or another."""

    kind: str
    dim: int | None = None

    def __str__(self) -> str:
        return self.kind if self.dim is None else f"{self.kind}({self.dim})"


@dataclass(frozen=True)
class Part:
    """What one rank holds of a DTensor.

    Attributes:
        local: its own tensor.
        shape: the whole tensor's.
        placements: how the whole is placed, one entry per axis of the mesh.
        coordinate: this rank's place in the mesh.
    """

    local: TensorRef
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    coordinate: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """The tensors of one file.

    Attributes:
        plain: name → a tensor that the file holds as it is.
        parts: name → what the file holds of a DTensor.
        broken: name → why it cannot be read.
    """

    plain: dict[str, TensorRef] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def listed(file: Place) -> Listing:
    """The tensors of the state dict in a file; what is no tensor is left out.

    Raises:
        SourceError: the file is no such archive, is damaged, or holds no dict.
    """
    archive = _Archive(file)
    content = archive.content()
    if not isinstance(content, Mapping):
        raise SourceError(f"{file} holds a {named(content) or type(content).__name__}, not a state dict of tensors")
    found = Listing()
    for name, value in content.items():
        if isinstance(value, Inert):
            try:
                archive.enter(found, str(name), value)
            except SourceError as problem:
                found.broken[str(name)] = str(problem)
    return found


@lru_cache(maxsize=4)
def placed(file: Place, stamp: Stamp) -> Mapping[str, TensorRef]:
    """Name → where the entries lie, of the tensors of a state dict that lie plainly in an archive; {} of another file.

    What is read from there is not mapped: a file that is cut off under a run is a message, and not the process's end.

    Args:
        file: where it is, on this machine.
        stamp: the version that is meant.
    """
    try:
        archive = _Archive(file)
        content, _ = unwrapped(archive.content())
    except SourceError:
        return {}
    found = Listing()
    for name, value in content.items() if isinstance(content, Mapping) and archive.stamp == stamp else ():
        if isinstance(value, Inert) and not value.args[6:]:  # what comes seventh says: conjugate, or negate
            with suppress(SourceError):
                archive.enter(found, str(name), value)
    return found.plain


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


class _Archive:
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

    def enter(self, found: Listing, name: str, value: Inert) -> None:
        """Add a tensor, plain or distributed.

        Raises:
            SourceError: it is neither, or contradicts itself.
        """
        if named(value) == "_rebuild_parameter" and value.args and isinstance(value.args[0], Inert):
            return self.enter(found, name, value.args[0])
        if named(value) == "_rebuild_tensor_v2":
            found.plain[name] = self._plain(name, value)
            return None
        made = value.args[1] if named(value) == "_rebuild_from_type_v2" and len(value.args) > 3 else value
        if named(made) != "DTensor":
            raise SourceError(f"{name} in {self.file} is a {named(made)}, which is not read; save plain tensors")
        state = Inert()
        state.state = value.args[3]
        local, spec = state.get("_local_tensor"), state.get("_spec")
        if not isinstance(local, Inert) or named(local) != "_rebuild_tensor_v2" or not isinstance(spec, Inert):
            raise SourceError(f"{name} in {self.file} is a DTensor without its local tensor; save it again")
        found.parts[name] = self._part(name, self._plain(name, local), spec)
        return None

    def _part(self, name: str, local: TensorRef, spec: Inert) -> Part:
        mesh, meta, given = (spec.get(key) for key in ("mesh", "tensor_meta", "placements"))
        coordinate = sizes_of(mesh.get("_coordinate_on_dim")) if isinstance(mesh, Inert) else None
        shape = sizes_of(meta.args[0]) if isinstance(meta, Inert) and meta.args else None
        placements = tuple(map(_placement, given)) if isinstance(given, tuple | list) else ()
        if shape is None or coordinate is None or not placements or len(placements) != len(coordinate):
            raise SourceError(f"{name} in {self.file} is a DTensor that does not say which part of the whole it is")
        return Part(local, shape, placements, coordinate)

    def _plain(self, name: str, value: Inert) -> TensorRef:
        """A tensor whose entries lie one after the other in a record of the archive."""
        where = f"{name} in {self.file}"
        try:
            (_, storage, key, _, count), offset, size, stride = value.args[:4]
        except (TypeError, ValueError):
            raise SourceError(f"{where} has no storage; save it again") from None
        dtype, shape, steps = _OF_STORAGE.get(named(storage)), sizes_of(size), sizes_of(stride)
        if dtype is None:
            raise SourceError(f"{where} has a {named(storage) or 'storage'} of unknown type; save plain tensors")
        if shape is None or steps is None or type(offset) is not int or offset < 0 or type(count) is not int:
            raise SourceError(f"{where} has no readable shape; save it again")
        if math.prod(shape) and not _is_contiguous(shape, steps):
            raise SourceError(f"{where} does not lie in row-major order; save it with .contiguous()")
        width = DTYPES[dtype][1]
        if math.prod(shape) and offset + math.prod(shape) > count:
            raise SourceError(f"{where} has fewer entries than its shape {list(shape)}; save it again")
        start = self._data(where, key, count * width) if math.prod(shape) else 0
        return TensorRef(
            self.file.path, name, dtype, shape, "archive", self.stamp, self.file.storage, start + offset * width, shape
        )

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


def _placement(found: Any) -> Placement:
    if not isinstance(found, Inert):
        return Placement("unknown")
    dim = found.get("dim") if found.get("dim") is not None else next(iter(found.args), None)
    return Placement(named(found), dim if type(dim) is int else None)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for size, given in zip(reversed(shape), reversed(stride), strict=False):
        if size > 1 and given != step:
            return False
        step *= size
    return len(shape) == len(stride)
