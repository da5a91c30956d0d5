"""What a result was computed from: files by size, time and the hash of their heads; deltas by their recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spectra._version import __version__
from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import Source
from spectra.files.tensors import TensorRef

_HEAD = 2**20


def of_delta(delta: WeightDelta) -> str:
    """A key that changes with the delta's files, its recipe or the code's version."""
    text = f"{__version__}|{delta.name}|{delta.status}|{delta.note}|{delta.recipe!r}|{delta.base!r}"
    return hashlib.sha256(text.encode()).hexdigest()


def of_pair(a: WeightDelta, b: WeightDelta) -> str:
    """A key for the comparison of two deltas."""
    return hashlib.sha256(f"{of_delta(a)}|{of_delta(b)}".encode()).hexdigest()


def of_files(source: Source) -> dict[str, dict[str, Any]]:
    """Path → size, modification time and hash of the first MiB, for every file that the source reads."""
    refs = (ref for delta in source.deltas for ref in delta.refs)
    return {path: _of_file(path, stamp) for path, stamp in sorted(_files(refs).items())}


def _files(refs: Iterable[TensorRef]) -> dict[str, tuple[int, int]]:
    return {ref.path: ref.stamp for ref in refs}


def _of_file(path: str, stamp: tuple[int, int]) -> dict[str, Any]:
    with Path(path).open("rb") as file:
        head = hashlib.sha256(file.read(_HEAD)).hexdigest()
    return {"size": stamp[0], "mtime_ns": stamp[1], "head_sha256": head}
