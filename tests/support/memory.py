"""A storage that is no disk: files in memory, which also notes what is read of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import fsspec

from spectra.errors import SourceError
from spectra.files.cloud import open_cloud
from spectra.files.storage import Place, Stamp


@dataclass(frozen=True, eq=False)
class Memory:
    """Path → content; `reads` has (path, offset, bytes) of every read, in order."""

    files: dict[str, bytes] = field(repr=False)
    reads: list[tuple[str, int, int]] = field(default_factory=list, repr=False)

    @classmethod
    def copy_of(cls, folder: Path) -> Memory:
        """The files below a folder of the disk, under the same paths."""
        return cls({str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()})

    def names(self, folder: str) -> list[str]:
        inner = (path.removeprefix(f"{folder}/") for path in self.files if path.startswith(f"{folder}/"))
        return sorted({path.partition("/")[0] for path in inner})

    def is_file(self, path: str) -> bool:
        return path in self.files

    def is_folder(self, path: str) -> bool:
        return bool(self.names(path))

    def stamp(self, path: str) -> Stamp:
        return (len(self._content(path)), f"etag-{hash(self._content(path)) % 10**8}")

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        piece = self._content(path)[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self.reads.append((path, offset, len(piece)))
        return len(piece)

    def leads_outside(self, path: str, folder: str) -> str | None:
        return None

    def local_path(self, path: str) -> str | None:
        return None

    def _content(self, path: str) -> bytes:
        if path not in self.files:
            raise SourceError(f"{path} cannot be opened: there is no such file")
        return self.files[path]


def in_memory(path: Path, root: Path) -> Place:
    """What lies at a path of the disk, as a place of a copy in memory of everything below `root`."""
    return Place(Memory.copy_of(root), str(path))


def in_fsspecs_memory(folder: Path) -> Place:
    """What lies in a folder of the disk, as fsspec's memory:// has it, under the same path."""
    fsspec.filesystem("memory").put(f"{folder}/", f"memory:/{folder}/", recursive=True)
    return open_cloud(f"memory:/{folder}")
