"""What a result was computed from: files by size, version and a content stamp; deltas by their recipe.

The content stamp is the hash of a file's first MiB, which holds its header, and of 64 KiB at 16 places spread over the
rest: a file that was saved again differs in it, for almost all of its bytes do; one changed byte somewhere between the
places does not show. The hash of everything (rehash=, --rehash) has no such gap and takes a whole reading. Of a file on
a server the version is enough, unless it is no more than date and size: then 4 KiB at 8 places go with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectra._version import __version__
from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.lanes import all_of
from spectra.files.remote import is_url, place_of
from spectra.files.storage import DISK, Place, Stamp
from spectra.files.tensors import TensorRef
from spectra.files.versions import tells_content

_HEAD = 2**20
_BLOCK = 2**16
_BLOCKS = 16
_CHUNK = 2**24
_FEW, _REQUESTS = 2**12, 7


def of_delta(delta: WeightDelta) -> str:
    """A key that changes with the delta's files, its recipe or the code's version; not with how paths were typed."""
    text = f"{__version__}|{delta.name}|{delta.status}|{delta.note}|{delta.recipe!r}|{delta.base!r}"
    for path in {part.path for part in _parts(delta) if _in_full(part) != part.path}:
        text = text.replace(f"path={path!r}", f"path={os.path.abspath(path)!r}")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_pair(a: str, b: str, top: int) -> str:
    """A key for the comparison of two deltas in so many directions, of theirs."""
    return hashlib.sha256(f"{a}|{b}|{top}".encode()).hexdigest()


def of_files(source: Source, *, rehash: bool = False) -> dict[str, dict[str, Any]]:
    """Path → size, version (a disk's modification time, a server's ETag) and, on a disk, content stamp of all files.

    Args:
        source: whose files.
        rehash: read all of each file, and give the hash of that as well.
    """
    one_per_file = {_in_full(part): part for delta in source.deltas for part in _parts(delta)}
    return {path: of_file(ref.file, ref.stamp, rehash=rehash) for path, ref in sorted(one_per_file.items())}


def _parts(delta: WeightDelta) -> Iterator[TensorRef]:
    """The stored tensors that a delta is read from."""
    return (part for ref in delta.refs for part in (ref.codec.refs if ref.codec else (ref,)))


def _in_full(part: TensorRef) -> str:
    """The path of a tensor's file, from wherever a command is run."""
    typed = part.path
    return typed if os.path.isabs(typed) or part.storage != DISK else os.path.abspath(typed)


def where(path: str) -> str:
    """A path of this machine in full, whatever folder a command is run in; the address of what is on a server as it is.

    >>> where("https://huggingface.co/org/name/resolve/5e0a")
    'https://huggingface.co/org/name/resolve/5e0a'
    """
    return path if is_url(path) else str(Path(path).resolve())


def of_file(file: Place, stamp: Stamp, *, rehash: bool = False) -> dict[str, Any]:
    """One file's entry; of what is not on this machine, samples only where the version does not tell the content."""
    size, _ = stamp
    if is_url(str(file)) and not rehash:
        return _stamped(stamp) if tells_content(stamp) else {**_stamped(stamp), "few_sha256": _few(file, size)}
    head = hashlib.sha256(file.read(0, min(_HEAD, size)))
    said = {**_stamped(stamp), "head_sha256": head.hexdigest()}
    if file.storage.local_path(file.path) is not None and size > _HEAD:
        sampled = hashlib.sha256()
        for block in range(_BLOCKS):
            sampled.update(file.read(_HEAD + (size - _HEAD - 1) * block // _BLOCKS, _BLOCK))
        sampled.update(file.read(max(_HEAD, size - _BLOCK), _BLOCK))
        said["sampled_sha256"] = sampled.hexdigest()
    if rehash:
        whole = hashlib.sha256()
        for start in range(0, size, _CHUNK):
            whole.update(file.read(start, _CHUNK))
        said["sha256"] = whole.hexdigest()
    return said


def _few(file: Place, size: int) -> str:
    """The hash of a file's first bytes, which are its header's, and of few others, since each block is a request."""
    starts = [(size - _FEW) * block // _REQUESTS for block in range(1, _REQUESTS + 1)] if size > _FEW else []
    blocks = all_of(lambda start: bytes(file.read(start, _FEW)), [0, *starts])
    return hashlib.sha256(b"".join(blocks)).hexdigest()


def _stamped(stamp: Stamp) -> dict[str, Any]:
    """Size, and a disk's modification time or a server's version."""
    size, version = stamp
    return {"size": size, "mtime_ns" if isinstance(version, int) else "version": version}


def version_of(entry: Mapping[str, Any]) -> int | str | None:
    """A disk's modification time in ns, or a server's version, which earlier runs called `mtime_ns`, too."""
    found: int | str | None = entry.get("version", entry.get("mtime_ns"))
    return found


def same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two entries are of one file, by all that both of them say."""
    ours, theirs = _compared(before), _compared(now)
    both = ours.keys() & theirs.keys()
    return bool(both) and all(ours[key] == theirs[key] for key in both)


def _compared(entry: Mapping[str, Any]) -> dict[str, Any]:
    said = {key: value for key, value in entry.items() if key not in ("mtime_ns", "version")}
    return said if version_of(entry) is None else {**said, "version": version_of(entry)}


def is_as_it_was(path: str, before: Mapping[str, Any]) -> bool:
    """Whether a file is there and is the one of an entry."""
    place = place_of(path) if is_url(path) else Place.of(path)
    try:
        stamp = place.stamp()
        quick = same(before, _stamped(stamp))
        return quick and same(before, of_file(place, stamp))
    except SourceError:
        return False
