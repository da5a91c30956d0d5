"""The `.metadata` of torch.distributed.checkpoint (DCP): every tensor's shape and type, and where its pieces are.

It is a pickle, and torch's reader unpickles it. Here it is read as plain data (`inert_pickle`) and checked.

Reference: PyTorch, `torch.distributed.checkpoint` (Metadata, TensorStorageMetadata, MetadataIndex).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from spectra.errors import SourceError
from spectra.files import limits
from spectra.files.dtypes import DTYPE_OF_TORCH
from spectra.files.inert_pickle import Inert, load, named, sizes_of
from spectra.files.storage import Place, Stamp

_CONVERT = "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt` makes one file of it"


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: its corner and size in it, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Listed:
    """A tensor as `.metadata` lists it: its type in safetensors' words, shape, pieces, and the keys that lead to it."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    path: tuple[str, ...]


@lru_cache(maxsize=4)
def listed(file: Place, stamp: Stamp) -> Mapping[str, Listed | str]:
    """Every tensor of a `.metadata` → what it says of it, or why that cannot be used."""
    if stamp[0] > limits.PICKLE:
        raise SourceError(f"{file} is larger than {limits.PICKLE} bytes; that is no list of tensors")
    content = load(file.read(0, stamp[0]), str(file))
    if not isinstance(content, Inert) or not isinstance(content.get("state_dict_metadata"), Mapping):
        raise SourceError(f"{file} is not the metadata of a distributed checkpoint ({named(content) or 'plain data'})")
    stored: dict[tuple[Any, Any], Inert] = {}
    given = content.get("storage_data")
    for index, info in (given if isinstance(given, Mapping) else {}).items():
        if isinstance(index, Inert) and isinstance(info, Inert):
            stored[str(index.get("fqn")), sizes_of(index.get("offset"))] = info
    paths = content.get("planner_data")
    entries: dict[str, Listed | str] = {}
    for key, entry in content.get("state_dict_metadata").items():
        if isinstance(key, str) and named(entry) == "TensorStorageMetadata":
            path = paths.get(key) if isinstance(paths, Mapping) else None
            try:
                entries[key] = _entry(key, entry, stored, path)
            except SourceError as problem:
                entries[key] = f"{key} in {file} {problem}; {_CONVERT}"
    return entries


def _entry(key: str, entry: Inert, stored: Mapping[tuple[Any, Any], Inert], path: Any) -> Listed:
    """One tensor's entry as plain data, and checked."""
    properties, shape, chunks = entry.get("properties"), sizes_of(entry.get("size")), entry.get("chunks")
    fields = properties.state if isinstance(properties, Inert) else None
    kind = named(fields[0]) if isinstance(fields, tuple) and fields else ""
    if kind not in DTYPE_OF_TORCH:
        raise SourceError(f"has the unknown type {kind or 'none'}")
    if shape is None or not isinstance(chunks, list):
        raise SourceError("has no shape")
    pieces = []
    for chunk in chunks:
        offsets = sizes_of(chunk.get("offsets")) if isinstance(chunk, Inert) else None
        sizes = sizes_of(chunk.get("sizes")) if isinstance(chunk, Inert) else None
        info = stored.get((key, offsets))
        if offsets is None or sizes is None or info is None:
            raise SourceError("has a piece that no file holds")
        place = [info.get(field) for field in ("relative_path", "offset", "length")]
        if not isinstance(place[0], str) or not all(type(it) is int and it >= 0 for it in place[1:]):
            raise SourceError("has a piece that no file holds")
        if info.get("transform_descriptors"):
            raise SourceError(f"is stored through {info.get('transform_descriptors')!r}, which is not read")
        pieces.append(Piece(offsets, sizes, *place))
    keys = tuple(map(str, path)) if isinstance(path, tuple | list) and path else (key,)
    return Listed(DTYPE_OF_TORCH[kind], shape, tuple(pieces), keys)
