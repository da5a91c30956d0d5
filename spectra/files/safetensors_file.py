"""Headers and tensors of one .safetensors file.

The header is checked and the bytes are read here rather than through the library, which maps the
whole file into memory: mapped pages count as the process's own, and a file that shrinks while it is
mapped kills the process. The tests hold this reader against the library on good and broken files.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import SourceError
from spectra.files.tensors import DTYPES, TensorRef, file_stamp

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000  # the format's own limit
_DOWNLOAD_AGAIN = "download or save it again"


def read_header(path: Path) -> tuple[dict[str, TensorRef], dict[str, str], dict[str, str]]:
    """The tensors that the file holds, the ones it names but cannot hold, and its metadata.

    Returns:
        name → reference; name → why it cannot be read; the `__metadata__` strings.

    Raises:
        SourceError: the file is not a safetensors file, or its header contradicts itself.
    """
    stamp = file_stamp(path)
    header, start = _parse(path, stamp[0])
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise SourceError(f"{path}: the header's __metadata__ is not an object; {_DOWNLOAD_AGAIN}")
    tensors: dict[str, TensorRef] = {}
    broken: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        spans.append((begin, end, name))
        if start + end > stamp[0]:
            broken[name] = f"{path} is truncated: {stamp[0]} of at least {start + end} bytes; {_DOWNLOAD_AGAIN}"
        else:
            tensors[name] = TensorRef(str(path), name, dtype, shape, "safetensors", stamp, start + begin, shape)
    _refuse_overlaps(path, spans)
    return tensors, broken, {str(key): str(value) for key, value in metadata.items()}


def _parse(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(b"version "):
            raise SourceError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        if len(head) < 8:
            raise SourceError(f"{path} is truncated: {size} bytes; {_DOWNLOAD_AGAIN}")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, MAX_HEADER):
            if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):  # in a shorter header these bytes are a length
                raise SourceError(
                    f"{path} is a pickle renamed to .safetensors and was not opened; name it .bin to read it"
                )
            raise SourceError(
                f"{path} is truncated or not a safetensors file: its header claims {length} bytes, "
                f"the file has {size}; {_DOWNLOAD_AGAIN}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as problem:
        raise SourceError(f"{path}: the header is not valid JSON ({problem}); {_DOWNLOAD_AGAIN}") from None
    if not isinstance(header, dict):
        raise SourceError(f"{path}: the header is not an object; {_DOWNLOAD_AGAIN}")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, begin, end]
        valid = isinstance(dtype, str) and all(type(n) is int and 0 <= n < 2**63 for n in numbers) and begin <= end
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise SourceError(f"{path}: the header's entry for {name!r} is malformed; {_DOWNLOAD_AGAIN}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype][1] != end - begin:
        raise SourceError(
            f"{path}: {name!r} of shape {list(shape)} and type {dtype} does not fill its {end - begin} bytes; "
            f"{_DOWNLOAD_AGAIN}"
        )
    return dtype, shape, begin, end


def _refuse_overlaps(path: Path, spans: list[tuple[int, int, str]]) -> None:
    ordered = sorted(span for span in spans if span[0] < span[1])
    for (_, end, name), (begin, _, other) in itertools.pairwise(ordered):
        if begin < end:
            raise SourceError(f"{path}: {name!r} and {other!r} overlap in the file; {_DOWNLOAD_AGAIN}")


def read_tensor(ref: TensorRef) -> Tensor:
    """The stored tensor, before its views."""
    import torch

    if ref.dtype not in DTYPES:
        raise SourceError(f"{ref.name} in {ref.path} has the type {ref.dtype}, which is not supported")
    torch_name, width = DTYPES[ref.dtype]
    dtype = getattr(torch, torch_name)
    if math.prod(ref.stored) == 0:
        return torch.empty(ref.stored, dtype=dtype)
    content = torch.empty(math.prod(ref.stored) * width, dtype=torch.uint8)
    view = content.numpy().data
    try:
        with open(ref.path, "rb", buffering=0) as file:
            file.seek(ref.offset)
            got = 0
            while got < len(view) and (count := file.readinto(view[got:])):
                got += count
    except OSError as problem:
        raise SourceError(f"{ref.path} cannot be read: {problem.strerror}") from None
    if got < len(view):
        raise SourceError(f"{ref.path} ends inside {ref.name}; {_DOWNLOAD_AGAIN}")
    return content.view(dtype).reshape(ref.stored)
