"""Files that fsspec opens: s3://, gs://, az:// and whatever else it knows, with the keys that its packages look up.

The packages make their own requests and retries. What is added here: one version of every file, every failure in one
sentence, and an end to waiting.
Reference: fsspec's documentation, "API Reference" (AbstractFileSystem) and "Features" (listings caching, which is off).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from spectra.errors import MissingExtraError, NotFoundError, SourceError
from spectra.files import http
from spectra.files.far import Far, look_anew
from spectra.files.lanes import Sink, lanes
from spectra.files.patience import answer
from spectra.files.storage import Place, Stamp

_PAUSES = (0.5, 2.0)  # seconds before another attempt: the packages have tried several times by then
_IN_THE_EXTRA = ("s3", "s3a", "gs", "gcs")
_VERSIONS = (  # what file systems call that which changes with the content, the surest first
    "ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip
_ERRORS_OF = ("botocore.exceptions", "aiohttp.client_exceptions", "google.auth.exceptions", "gcsfs.retry",
              "azure.core.exceptions")  # fmt: skip

_pins: dict[str, Stamp] = {}
_idle: dict[tuple[int, str], list[Any]] = {}  # process and protocol → file systems that nobody is asking


@dataclass(frozen=True)
class Cloud(Far):
    """Files below URLs of one protocol.

    Attributes:
        protocol: such as "s3".
    """

    protocol: str

    def names(self, folder: str) -> list[str]:
        """As `Storage.names`."""
        with _told(folder, "listed"):
            inner = folder.rstrip("/")
            listed = self._ask(folder, lambda files: files.ls(inner, detail=False))
            found = {item.rstrip("/").rpartition("/")[2] for item in listed}
        return sorted(found - {""})

    def is_file(self, path: str) -> bool:
        """Whether there is a file at the URL."""
        try:
            return bool(path in _pins or self.stamp(path))
        except NotFoundError:
            return False

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder at the URL."""
        with _told(path, "looked at"):
            return path not in _pins and bool(self._ask(path, lambda files: files.isdir(path)))

    def stamp(self, path: str) -> Stamp:
        """Size and version, as they were when the file was first asked for."""
        if path not in _pins:
            with lanes:
                _pins.setdefault(path, self._stamp_now(path))
        return _pins[path]

    def piece(self, path: str, offset: int, buffer: Sink, stamp: Stamp) -> int:
        """As `Far.piece`; the version is looked at once the bytes are here."""
        stop = min(offset + len(buffer), stamp[0])
        wanted = max(stop - offset, 0)
        content = self._content(path, offset, stop) if wanted else b""
        if self._stamp_now(path) != stamp:
            _pins.pop(path, None)  # whoever opens it again gets what is there now
            raise http.ChangedError(path)
        buffer[:wanted] = content
        return wanted

    def _content(self, path: str, start: int, stop: int) -> bytes:
        """Bytes of whatever version is there."""
        for pause in (*_PAUSES, None):
            with _told(path, "read", again=pause is not None):
                content: bytes = self._ask(
                    path, lambda files: files.cat_file(path, start=start, end=stop), stop - start
                )
                http.count(len(content))
                if len(content) == stop - start:
                    return content
            if pause is not None:
                time.sleep(pause)
        raise SourceError(f"{path} cannot be read: fewer bytes come than it has; run the same again later")

    def _ask(self, path: str, what: Callable[[Any], Any], size: int = 0) -> Any:
        """What fsspec's file system says, within a time; each is asked one thing at a time."""
        idle = _idle.setdefault((os.getpid(), self.protocol), [])

        def ask() -> Any:
            files = idle.pop() if idle else self._files()
            try:
                return what(files)
            finally:
                idle.append(files)

        return answer(path, ask, size)

    def _files(self) -> Any:
        """A new file system of fsspec's."""
        try:
            import fsspec

            return fsspec.filesystem(self.protocol, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as problem:
            if self.protocol in _IN_THE_EXTRA or problem.name == "fsspec":
                raise MissingExtraError(f"reading {self.protocol}://", "cloud") from None
            raise SourceError(f"{self.protocol}:// cannot be read: {problem}") from None
        except ValueError as problem:  # "Protocol not known"
            raise NotFoundError(f"{self.protocol}:// is nothing that fsspec opens: {problem}") from None

    def _stamp_now(self, path: str) -> Stamp:
        with _told(path, "opened"):
            said = self._ask(path, lambda files: files.info(path))
        if said.get("type") == "directory":
            raise NotFoundError(f"{path} is a folder")
        version = next((said[key] for key in _VERSIONS if said.get(key)), None)
        if said.get("size") is None or version is None:
            raise SourceError(
                f"{path}: nothing would tell that it changes while it is read: download it and pass its path"
            )
        return (int(said["size"]), str(version).strip('"'))


def open_cloud(url: str) -> Place:
    """The folder or file at a URL that fsspec opens, looked at anew.

    Raises:
        NotFoundError: there is nothing.
        SourceError: it cannot be looked at.
    """
    for path in [path for path in _pins if path.startswith(url)]:
        _pins.pop(path, None)
    look_anew(url)
    place = Place(Cloud(url.partition("://")[0]), url)
    if not place.is_file() and not place.is_folder():
        raise NotFoundError(f"{url}: there is no such file or folder")
    return place


@contextmanager
def _told(path: str, what: str, *, again: bool = False) -> Iterator[None]:
    """Errors of the packages as one sentence; where another attempt follows, only those that it would not mend."""
    try:
        yield
    except SourceError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"{path} cannot be {what}: there is no such file or folder") from None
    except PermissionError as problem:
        raise NotFoundError(f"{path} cannot be {what}: access is refused ({_line(problem)}); {_KEYS}") from None
    except _families() as problem:
        if "redential" in type(problem).__name__ + str(problem):
            raise NotFoundError(f"{path} cannot be {what}: {_line(problem)}; {_KEYS}") from None
        if not again:
            raise SourceError(f"{path} cannot be {what}: {_line(problem)}; run the same again later") from None


_KEYS = "give the keys as the package of the protocol takes them, by its environment variables or files"


def _families() -> tuple[type[Exception], ...]:
    """Everything that fsspec's packages raise: built-in errors, and those of the clients that are loaded."""
    modules = [sys.modules[name] for name in _ERRORS_OF if name in sys.modules]
    theirs = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    own = [value for value in theirs if issubclass(value, Exception)]
    return (*own, OSError, ValueError, RuntimeError, LookupError, TypeError)


def _line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
