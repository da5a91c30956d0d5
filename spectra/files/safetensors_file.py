"""The header of one .safetensors file.

It is checked and the bytes are read by our own code rather than through the library, which maps the
whole file into memory: mapped pages count as the process's own, and a file that shrinks while it is
mapped kills the process. The tests hold this reader against the library on good and broken files.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from spectra.errors import SourceError
from spectra.files import limits
from spectra.files.dtypes import plain_bytes
from spectra.files.header import Header
from spectra.files.storage import Place
from spectra.files.tensors import TensorRef

_DOWNLOAD_AGAIN = "download or save it again"
_Span = tuple[int, int, str]  # where a tensor's bytes begin and end among the data, and its name


def read_header(file: Place) -> Header:
    """The tensors that the file holds, the ones it names but cannot hold, and its `__metadata__` strings.

    Raises:
        SourceError: the file is not a safetensors file, or its header contradicts itself.
    """
    stamp = file.stamp()
    header, start = _parse(file, stamp[0])
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError(f"{file}: the header's __metadata__ is not an object of strings; {_DOWNLOAD_AGAIN}")
    tensors: dict[str, TensorRef] = {}
    broken: dict[str, str] = {}
    spans: list[_Span] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(file, name, entry)
        spans.append((begin, end, name))
        if start + end > stamp[0]:
            broken[name] = f"{file} is truncated: {stamp[0]} of at least {start + end} bytes; {_DOWNLOAD_AGAIN}"
        else:
            tensors[name] = TensorRef(
                file.path, name, dtype, shape, "safetensors", stamp, file.storage, start + begin, shape
            )
    _check_layout(file, spans, stamp[0] - start)
    return Header(tensors, broken, metadata)


def _parse(file: Place, size: int) -> tuple[dict[str, Any], int]:
    """The header as JSON, and where it ends."""
    head = file.head(0, 8)
    if head.startswith(b"version "):
        raise SourceError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if len(head) < 8:
        raise SourceError(f"{file} is truncated: {size} bytes; {_DOWNLOAD_AGAIN}")
    (length,) = struct.unpack("<Q", head)
    if length > min(size - 8, limits.HEADER):
        if head.startswith((b"PK", b"\x80\x02", b"\x80\x04")):  # in a shorter header these bytes are a length
            raise SourceError(f"{file} is a pickle renamed to .safetensors and was not opened; name it .bin to read it")
        raise SourceError(
            f"{file} is truncated or not a safetensors file: its header claims {length} bytes, "
            f"the file has {size}; {_DOWNLOAD_AGAIN}"
        )
    text = file.head(8, length)
    _check_counts(file, text)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as problem:
        raise SourceError(f"{file}: the header is not valid JSON ({problem}); {_DOWNLOAD_AGAIN}") from None
    if not isinstance(header, dict):
        raise SourceError(f"{file}: the header is not an object; {_DOWNLOAD_AGAIN}")
    return header, 8 + length


def _check_counts(file: Place, text: bytearray) -> None:
    """Refuse a header of absurdly many tensors or keys before it is parsed, which costs ten times its size."""
    tensors, quotes = text.count(b"data_offsets"), text.count(b'"') - text.count(b'\\"')
    keys = (quotes - 10 * tensors) // 4  # a tensor has five strings, a key of the metadata two
    for count, limit, what in ((tensors, limits.TENSORS, "tensors"), (keys, limits.METADATA, "metadata keys")):
        if count > limit:
            raise SourceError(f"{file}: the header {limits.too_many(count, limit, what)}; {_DOWNLOAD_AGAIN}")
    lists = text.count(b"[") + text.count(b"{")
    if lists > 3 * limits.TENSORS + 2 or text.count(b",") > limits.METADATA + (limits.AXES + 4) * (tensors + 1):
        raise SourceError(f"{file}: the header holds more than tensors and strings; {_DOWNLOAD_AGAIN}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _entry(file: Place, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, begin, end]
        valid = (
            isinstance(dtype, str)
            and len(numbers) <= limits.AXES + 2
            and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
            and begin <= end
        )
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise SourceError(f"{file}: the header's entry for {name!r} is malformed; {_DOWNLOAD_AGAIN}")
    if plain_bytes(dtype, math.prod(shape)) not in (None, end - begin):
        raise SourceError(
            f"{file}: {name!r} of shape {list(shape)} and type {dtype} does not fill its {end - begin} bytes; "
            f"{_DOWNLOAD_AGAIN}"
        )
    return dtype, shape, begin, end


def _check_layout(file: Place, spans: list[_Span], size: int) -> None:
    """Refuse a file whose tensors do not lie one after the other from the first data byte to the last.

    The format allows neither holes nor overlaps nor a tail: the header then belongs to another file's data,
    and which bytes are whose is not known. A file that ends too early is another matter: what lies before is whole.
    """
    last, place = "", 0
    for begin, end, name in sorted(spans):
        if begin < place:
            raise SourceError(f"{file}: {last!r} and {name!r} overlap in the file; {_DOWNLOAD_AGAIN}")
        if begin > place:
            where = f"between {last!r} and {name!r}" if last else f"before {name!r}"
            raise SourceError(
                f"{file}: the bytes {where}, {begin - place} of them, belong to no tensor, so the header is not of "
                f"these data; {_DOWNLOAD_AGAIN}"
            )
        last, place = name, end
    if place < size:
        after = f"after {last!r}, the last tensor," if last else "after the header, which names no tensor,"
        raise SourceError(
            f"{file}: the bytes {after} {size - place} of them, belong to no tensor, so the header is not of these "
            f"data; {_DOWNLOAD_AGAIN}"
        )
