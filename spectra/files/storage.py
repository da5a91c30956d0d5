"""Where files lie: a `Storage` lists names and reads byte ranges, a `Place` is one folder or file in it.

Everything else reads through these two, so that a model on a disk, behind HTTP or in memory is the same
model. A new storage is one class with the methods of `Storage`; `open_folder(Place(storage, path))` opens it.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from spectra.errors import SourceError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# A file's size in bytes, and what changes when its content does: a disk's mtime (ns), a server's ETag.
Stamp = tuple[int, int | str]
_STREAM_BUFFER = 2**20  # a range that is asked for costs a round trip, so a stream asks for few


class Storage(Protocol):
    """What lists names and reads byte ranges.

    Paths have "/" between their names, and they are what messages show. A storage is frozen, hashable and
    picklable and has a short repr: every `TensorRef` takes it along to other processes and into the
    fingerprints of results.
    """

    def names(self, folder: str) -> list[str]:
        """The names of the files and folders in a folder, sorted.

        Raises:
            SourceError: the folder cannot be listed.
        """

    def is_file(self, path: str) -> bool:
        """Whether there is a file at the path."""

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder at the path."""

    def stamp(self, path: str) -> Stamp:
        """Size and version of a file.

        Raises:
            SourceError: it cannot be looked at.
        """

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fill the buffer with the file's bytes from `offset` on, and return how many: fewer only where it ends.

        Raises:
            SourceError: the bytes cannot be had.
        """

    def leads_outside(self, path: str, folder: str) -> str | None:
        """Where a link takes the path out of the folder; None where it does not, or where there are no links."""

    def local_path(self, path: str) -> str | None:
        """The file's path on this machine, for libraries that map files into memory; None if it is elsewhere."""


@dataclass(frozen=True)
class Disk:
    """The file systems of this machine."""

    def names(self, folder: str) -> list[str]:
        """As `Storage.names`."""
        try:
            return sorted(os.listdir(folder))
        except OSError as problem:
            raise SourceError(f"{folder} cannot be listed: {problem.strerror}") from None

    def is_file(self, path: str) -> bool:
        """Whether there is a file at the path, links followed."""
        return os.path.isfile(path)

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder at the path, links followed."""
        return os.path.isdir(path)

    def stamp(self, path: str) -> Stamp:
        """Size and modification time in ns, links followed."""
        try:
            status = os.stat(path)
        except OSError as problem:
            raise SourceError(f"{path} cannot be opened: {problem.strerror}") from None
        return (status.st_size, status.st_mtime_ns)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """As `Storage.read_into`; the bytes go into the buffer without a copy between."""
        filled = 0
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
                    filled += count
        except OSError as problem:
            raise SourceError(f"{path} cannot be read: {problem.strerror}") from None
        return filled

    def leads_outside(self, path: str, folder: str) -> str | None:
        """As `Storage.leads_outside`; a hub cache's snapshots may link to the blobs of their repository."""
        try:
            home, target = Path(folder).resolve(), Path(path).resolve()
        except (OSError, RuntimeError) as problem:  # too long, or links in a circle
            raise SourceError(f"{path} cannot be followed: {problem}") from None
        allowed = [home]
        for parent in (home, *home.parents):
            if parent.parent.name == "snapshots":  # …/models--org--name/snapshots/<commit>[/<component>]
                allowed.append(parent.parent.parent / "blobs")
                break
        return None if any(target.is_relative_to(root) for root in allowed) else str(target)

    def local_path(self, path: str) -> str | None:
        """The path itself."""
        return path


DISK = Disk()


@dataclass(frozen=True)
class Place:
    """A folder or file of a storage; its text is its path.

    Example:
        >>> place = Place.of("models/tuned") / "model.safetensors"
        >>> place.name, place.suffix, str(place.parent)
        ('model.safetensors', '.safetensors', 'models/tuned')
    """

    storage: Storage
    path: str

    @classmethod
    def of(cls, path: Place | str | Path) -> Place:
        """A path of this machine as a place; a place as it is."""
        return path if isinstance(path, Place) else cls(DISK, Path(path).as_posix())

    def __str__(self) -> str:
        return self.path

    def __truediv__(self, name: str) -> Place:
        # A name from an index may be "./x"; the path of a storage may be a URL, whose "//" has to stay.
        name = str(PurePosixPath(name))
        return Place(self.storage, name if self.path == "." else posixpath.join(self.path, name))

    @property
    def name(self) -> str:
        """The last name of the path."""
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on, or ""."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> Place:
        """The folder that it lies in."""
        return Place(self.storage, posixpath.dirname(self.path) or ".")

    def is_file(self) -> bool:
        """Whether there is a file here."""
        return self.storage.is_file(self.path)

    def is_folder(self) -> bool:
        """Whether there is a folder here."""
        return self.storage.is_folder(self.path)

    def items(self) -> list[Place]:
        """What lies in this folder, sorted by name."""
        return [self / name for name in self.storage.names(self.path)]

    def stamp(self) -> Stamp:
        """Size and version of this file."""
        return self.storage.stamp(self.path)

    def read(self, offset: int, count: int) -> bytearray:
        """So many bytes from `offset` on; fewer where the file ends."""
        content = bytearray(count)
        del content[self.read_into(offset, memoryview(content)) :]
        return content

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """As `Storage.read_into`."""
        return self.storage.read_into(self.path, offset, buffer)

    def head(self, offset: int, count: int) -> bytearray:
        """As `read`, of what the file says of itself: from another machine it comes once, however often it is asked."""
        content = bytearray(count)
        del content[self._head_into(offset, memoryview(content)) :]
        return content

    def _head_into(self, offset: int, buffer: memoryview) -> int:
        read: Callable[[str, int, memoryview], int] = getattr(self.storage, "head_into", self.storage.read_into)
        return read(self.path, offset, buffer)

    def open(self) -> io.BufferedReader:
        """This file as a seekable stream, for parsers of its head and libraries that want one."""
        return io.BufferedReader(_Stream(self), _STREAM_BUFFER)


class _Stream(io.RawIOBase):
    """The bytes of a place behind a position."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._size = place.stamp()[0]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"a position before the start of {self._place}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(self._size - self._position, 0)]
        count = self._place._head_into(self._position, view) if view else 0
        self._position += count
        return count
