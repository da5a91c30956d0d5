"""What a result was computed from: files by size, time and the hash of their heads; deltas by their recipe."""

from __future__ import annotations

import hashlib
from typing import Any

from spectra._version import __version__
from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import Source
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
    """Path → size, version (a disk's modification time) and hash of the first MiB, for every file that is read."""
    refs = (ref for delta in source.deltas for ref in delta.refs)
    stored = (part for ref in refs for part in (ref.codec.refs if ref.codec else (ref,)))
    one_per_file = {part.path: part for part in stored}
    return {path: _of_file(ref) for path, ref in sorted(one_per_file.items())}


def _of_file(ref: TensorRef) -> dict[str, Any]:
    size, version = ref.stamp
    head = hashlib.sha256(ref.file.read(0, min(_HEAD, size)))
    return {"size": size, "mtime_ns": version, "head_sha256": head.hexdigest()}
