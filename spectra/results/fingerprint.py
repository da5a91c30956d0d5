"""What a result was computed from: files by size, version and the hash of their heads; deltas by their recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectra._version import __version__
from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.remote import is_url, place_of
from spectra.files.storage import Place
from spectra.files.tensors import TensorRef

_HEAD = 2**20


def of_delta(delta: WeightDelta) -> str:
    """A key that changes with the delta's files, its recipe or the code's version."""
    text = f"{__version__}|{delta.name}|{delta.status}|{delta.note}|{delta.recipe!r}|{delta.base!r}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_pair(a: str, b: str, top: int) -> str:
    """A key for the comparison of two deltas in so many directions, of theirs."""
    return hashlib.sha256(f"{a}|{b}|{top}".encode()).hexdigest()


def of_files(source: Source) -> dict[str, dict[str, Any]]:
    """Path → size and version of every file that is read: a server's ETag; a disk's time, and hash of the first MiB."""
    refs = (ref for delta in source.deltas for ref in delta.refs)
    stored = (part for ref in refs for part in (ref.codec.refs if ref.codec else (ref,)))
    one_per_file = {part.path: part for part in stored}
    return {path: _of_file(ref) for path, ref in sorted(one_per_file.items())}


def where(path: str) -> str:
    """A path of this machine in full, whatever folder a command is run in; the address of what is on a server as it is.

    >>> where("https://huggingface.co/org/name/resolve/5e0a")
    'https://huggingface.co/org/name/resolve/5e0a'
    """
    return path if is_url(path) else str(Path(path).resolve())


def is_as_it_was(path: str, file: Mapping[str, Any]) -> bool:
    """Whether a file is there and has the size and version that `of_files` says."""
    place = place_of(path) if is_url(path) else Place.of(path)
    try:
        return place.stamp() == (file["size"], file["mtime_ns"])
    except SourceError:
        return False


def _of_file(ref: TensorRef) -> dict[str, Any]:
    size, version = ref.stamp
    if is_url(ref.path):
        return {"size": size, "mtime_ns": version}  # a server's tells the content: no head is read
    head = hashlib.sha256(ref.file.read(0, min(_HEAD, size)))
    return {"size": size, "mtime_ns": version, "head_sha256": head.hexdigest()}
