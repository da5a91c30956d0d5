"""The folder that an extraction makes: it appears whole or not at all, and its weights are written as they come."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import StoreError
from spectra.files.dtypes import DTYPE_OF_TORCH
from spectra.lazy import torch
from spectra.results.homes import home_of

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 2**24  # bytes that are copied at a time


@dataclass
class TensorFile:
    """A safetensors file of tensors that come one at a time; none is kept in memory.

    The format wants all shapes before the first number, so the numbers wait in a file of their own until `close`.

    Attributes:
        path: the file to write.
        entries: name → dtype, shape, and where its bytes lie among those that wait.
    """

    path: Path
    entries: dict[str, tuple[str, list[int], int, int]] = field(default_factory=dict)

    @property
    def _waiting(self) -> Path:
        return self.path.with_name(f".{self.path.name}.data")

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to the end of what waits."""
        with self._waiting.open("ab") as file:
            for name, tensor in tensors.items():
                content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                dtype = DTYPE_OF_TORCH[str(tensor.dtype).removeprefix("torch.")]
                self.entries[name] = (dtype, list(tensor.shape), file.tell(), content.nbytes)
                file.write(content.data)

    def rename(self, old: str, new: str) -> None:
        """Give a tensor that waits another name."""
        self.entries[new] = self.entries.pop(old)

    def close(self, metadata: Mapping[str, str]) -> None:
        """Put everything in its place, wide types first and then by name, whatever order it came in."""
        order = sorted(self.entries, key=lambda name: (-_width(self.entries[name]), name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name in order:
            dtype, shape, _, size = self.entries[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # numbers start at a multiple of eight, as readers that map the file want it
        with self.path.open("wb") as target, self._waiting.open("rb") as source:
            target.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                _, _, start, size = self.entries[name]
                source.seek(start)
                for begin in range(0, size, _CHUNK):
                    target.write(source.read(min(_CHUNK, size - begin)))
            target.flush()
            os.fsync(target.fileno())
        self._waiting.unlink()


def _width(entry: tuple[str, list[int], int, int]) -> int:
    """Bytes of one number; those of an empty tensor do not matter."""
    size = 1
    for length in entry[1]:
        size *= length
    return entry[3] // size if size else 0


def check_free(directory: str | Path) -> Path:
    """The folder, if nothing is in it yet. What killed processes left beside it is removed, whatever it holds.

    Raises:
        StoreError: it holds something, or is a file.
    """
    folder = home_of(directory)
    _remove_abandoned(folder.resolve())
    if folder.is_dir() and next(folder.iterdir(), None) is None:
        return folder
    if folder.exists() or folder.is_symlink():
        what = "is not empty" if folder.is_dir() else "is not a folder"
        raise StoreError(f"{folder} {what}, and nothing in it was touched: choose another --out")
    return folder


@contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """A hidden folder beside the one that is wanted, which takes its name if all goes well and is gone if not.

    Raises:
        StoreError: there is something already, or the disk does not let itself be written to.
    """
    folder = check_free(directory).resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            os.replace(partial, check_free(folder))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as problem:
        raise StoreError(
            f"{folder} cannot be written ({problem.strerror}); make room or choose another --out"
        ) from None


def _remove_abandoned(folder: Path) -> None:
    """Remove the partial folders of processes that are no more."""
    for left in folder.parent.glob(".*.partial"):
        owner = left.name.removeprefix(f".{folder.name}.").removesuffix(".partial")
        if left.name == f".{folder.name}.{owner}.partial" and owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True
