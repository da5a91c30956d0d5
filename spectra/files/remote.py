"""Models that are not on this disk: of the hub, at one commit, and below a URL. Only what is asked for is read.

The paths are the URLs of the files, and so are those in recipes: a process on another machine reads for itself, under
the same commit and the same version of every file.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from spectra.errors import NotFoundError, SourceError
from spectra.files import download, http, snapshots
from spectra.files.ahead import SMALL, Ahead
from spectra.files.choice import KNOWN_NAMES, WEIGHT_SUFFIXES
from spectra.files.storage import DISK, Place, Stamp
from spectra.files.tensors import TensorRef

_PIECE = 8 * 2**20  # bytes per request of what is large: enough to hide a round trip, little to ask for again
_LANES = 8  # requests at a time in this process
_KEPT = 4 * 2**20  # bytes of a config or index that is kept
_ABSENT_FOR = 30.0  # seconds for which a file that was not there is not asked for again
_PAGE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/]+)(?P<rest>/.*)?)?/?")
_RESOLVED = re.compile(r"(?P<hub>.+?)/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<commit>[0-9a-f]{40})(?:/.*)?")
_HUBS = ("https://huggingface.co", "https://hf.co")

_lanes = threading.BoundedSemaphore(_LANES)
_listings: dict[Hub, dict[str, Stamp]] = {}
_pins: dict[str, Stamp] = {}
_absent: dict[str, float] = {}
_ahead: list[Ahead] = []
_configs: dict[tuple[str, Stamp], bytes] = {}


@dataclass(frozen=True)
class Hub:
    """The files of one commit of a model of the hub; those that the hub's cache on this machine has are read there.

    Attributes:
        endpoint: the hub's address.
        repo: the model's id.
        commit: its full name.
    """

    endpoint: str
    repo: str
    commit: str

    @property
    def root(self) -> str:
        """The path of the folder of all files."""
        return f"{self.endpoint}/{self.repo}/resolve/{self.commit}"

    def names(self, folder: str) -> list[str]:
        """As `Storage.names`, from the hub's list of files."""
        inner = self._inside(folder)
        below = [path.removeprefix(inner) for path in self._listing() if path.startswith(inner)]
        return sorted({path.partition("/")[0] for path in below})

    def is_file(self, path: str) -> bool:
        """Whether the commit has the file."""
        return self._name(path) in self._listing()

    def is_folder(self, path: str) -> bool:
        """Whether the commit has files below the path."""
        inner = self._inside(path)
        return any(name.startswith(inner) for name in self._listing())

    def stamp(self, path: str) -> Stamp:
        """Size, and the hash by which the hub knows the content: of the file, or of its blob in git."""
        found = self._listing().get(self._name(path))
        if found is None:
            raise NotFoundError(f"{path} is not among the files of {self.repo}")
        return found

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """As `Storage.read_into`, from the cache where it has the file."""
        local = self.local_path(path)
        return DISK.read_into(local, offset, buffer) if local else _read(path, offset, buffer, self.stamp(path))

    def leads_outside(self, path: str, folder: str) -> None:
        """There are no links."""

    def local_path(self, path: str) -> str | None:
        """Where the cache has the file, whole."""
        name = self._name(path)
        stamp = self._listing().get(name)
        file = snapshots.cache() / f"models--{self.repo.replace('/', '--')}" / "snapshots" / self.commit / name
        return str(file) if stamp and file.is_file() and file.stat().st_size == stamp[0] else None

    def _name(self, path: str) -> str:
        return unquote(path.removeprefix(self.root).strip("/"))

    def _inside(self, folder: str) -> str:
        name = self._name(folder)
        return f"{name}/" if name else ""

    def _listing(self) -> dict[str, Stamp]:
        if self not in _listings:
            open_hub(self.repo, self.commit, self.endpoint)
        return _listings[self]


@dataclass(frozen=True)
class Web:
    """Files below URLs. A server lists no folders, so what a folder holds is found by asking for the usual names."""

    def names(self, folder: str) -> list[str]:
        """As `Storage.names`: which of the names that models have are there."""
        refused: list[str] = []

        def there(name: str) -> bool:
            try:
                return self._find(f"{folder.rstrip('/')}/{name}") is not None
            except NotFoundError as problem:
                refused.append(str(problem))
                return False

        with ThreadPoolExecutor(_LANES) as pool:
            found = [name for name, is_there in zip(KNOWN_NAMES, pool.map(there, KNOWN_NAMES), strict=True) if is_there]
        if not found and refused:
            raise SourceError(refused[0])
        if not found:
            raise NotFoundError(f"{folder} has none of the names that models have, and a server lists no others: "
                                "name the file of weights")  # fmt: skip
        return sorted(found)

    def is_file(self, path: str) -> bool:
        """Whether the server gives something for the URL."""
        try:
            return self._find(path) is not None
        except NotFoundError:
            return False  # some servers refuse what is not there; `names` and `stamp` say so where it matters

    def is_folder(self, path: str) -> bool:
        """Whether the URL is to be read as a folder's: it does not end as the name of a file."""
        return not _is_a_file(path)

    def stamp(self, path: str) -> Stamp:
        """Size and version, as they were when the file was first asked for."""
        found = self._find(path)
        if found is None:
            raise NotFoundError(f"{path}: there is no such file (404)")
        return found

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """As `Storage.read_into`."""
        try:
            return _read(path, offset, buffer, self.stamp(path))
        except http.ChangedError:
            _pins.pop(path, None)  # whoever opens it again gets what is there now
            raise

    def leads_outside(self, path: str, folder: str) -> None:
        """There are no links."""

    def local_path(self, path: str) -> None:
        """It is elsewhere."""

    def _find(self, url: str) -> Stamp | None:
        if url in _pins:
            return _pins[url]
        if time.monotonic() - _absent.get(url, -_ABSENT_FOR) < _ABSENT_FOR:
            return None
        try:
            with _lanes:
                found = http.stat(url)
        except http.AbsentError:
            _absent[url] = time.monotonic()
            return None
        return _pins.setdefault(url, found)


WEB = Web()


def open_hub(repo: str, revision: str, endpoint: str | None = None) -> Place:
    """The folder of a model at the commit that a branch, tag or commit means now.

    Raises:
        NotFoundError: the hub does not give it; the message says why, without naming the model.
    """
    at = endpoint or http.endpoint()
    info = http.retried(at, lambda: download.info(repo, revision, endpoint=at))
    storage = Hub(at, repo, info.sha)
    _listings[storage] = {file.rfilename: _stamp_of(storage, file) for file in info.siblings or ()}
    return Place(storage, storage.root)


def _stamp_of(storage: Hub, file: Any) -> Stamp:
    tag = file.lfs.sha256 if file.lfs else file.blob_id
    if file.size is None or not tag:
        raise NotFoundError(f"{storage.endpoint} does not say which version of {file.rfilename} it has")
    return (file.size, tag)


def is_url(text: str) -> bool:
    """Whether what the user typed is the address of something on a server."""
    return re.match(r"https?://", text) is not None


def open_url(url: str) -> Place:
    """The folder or file at a URL, looked at anew; the pages of a model on the hub mean the model.

    Raises:
        SourceError: the URL holds a password or a query.
        NotFoundError: it is a page of the hub, and the hub does not give the model.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SourceError(f"the URL of {parts.hostname} holds a password, which results would keep: leave it out")
    if parts.query not in ("", "download=true"):
        raise SourceError(f"{url.partition('?')[0]}?… has a query, which results would keep: pass a URL without")
    if download.offline():
        raise NotFoundError(f"{url} is not on this machine, and HF_HUB_OFFLINE is set")
    plain = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    for hub in (http.endpoint(), *_HUBS):
        if not plain.startswith(f"{hub}/"):
            continue
        found = _PAGE.fullmatch(plain.removeprefix(f"{hub}/"))
        if found is None or found["repo"].startswith(("datasets/", "spaces/")):
            raise NotFoundError(f"{plain} is no page of a model on the hub: pass its id, org/name")
        place = open_hub(found["repo"], unquote(found["revision"] or "main"))
        rest = (found["rest"] or "").strip("/")
        return place / rest if rest else place
    for known in (_pins, _absent):
        for path in [path for path in known if path.startswith(plain)]:
            known.pop(path, None)
    return Place(WEB, plain)


def place_of(path: str) -> Place:
    """The place that a stored path of this kind means, without looking whether it is there."""
    found = _RESOLVED.fullmatch(path)
    return Place(Hub(found["hub"], found["repo"], found["commit"]) if found else WEB, path)


def model_of(path: str) -> str:
    """The id of the model of the hub that the address of a folder or file belongs to; "" for any other.

    >>> model_of("https://huggingface.co/org/name/resolve/" + 40 * "a")
    'org/name'
    """
    found = _RESOLVED.fullmatch(path)
    return found["repo"] if found else ""


@contextmanager
def expected(refs: Iterable[TensorRef]) -> Iterator[None]:
    """Say what is going to be read, so that small neighbours on a server come together."""
    spans: dict[str, set[tuple[int, int]]] = {}
    for part in (part for ref in refs for part in ref.parts):
        if 0 < part.bytes_read <= SMALL and isinstance(part.storage, Hub | Web) and is_remote(part.file):
            spans.setdefault(part.path, set()).add((part.offset, part.offset + part.bytes_read))
    ahead = Ahead(spans)
    if spans:
        _ahead.append(ahead)
    try:
        yield
    finally:
        if spans:
            _ahead.remove(ahead)


def is_remote(place: Place) -> bool:
    """Whether reading there asks a server."""
    return isinstance(place.storage, Hub | Web) and place.storage.local_path(place.path) is None


def _is_a_file(url: str) -> bool:
    return Path(urlsplit(url).path).suffix in (*WEIGHT_SUFFIXES, ".json", ".yaml")


def _read(url: str, offset: int, buffer: memoryview, stamp: Stamp) -> int:
    """As `Storage.read_into`: what is large in pieces at a time; a config or an index, which is read twice, once."""
    if url.endswith(".json") and offset == 0 and len(buffer) == stamp[0] <= _KEPT:
        key = (url, stamp)
        if key not in _configs:
            count = _fetch(url, 0, buffer, stamp)
            _configs[key] = bytes(buffer[:count])
        buffer[: len(_configs[key])] = _configs[key]
        return len(_configs[key])

    def fetch(start: int, into: memoryview) -> int:
        return _fetch(url, start, into, stamp)

    return _ahead[-1].read_into(url, offset, buffer, fetch) if _ahead else fetch(offset, buffer)


def _fetch(url: str, offset: int, buffer: memoryview, stamp: Stamp) -> int:
    starts = range(0, len(buffer), _PIECE)
    quoted = quote(url, safe=":/%")

    def piece(start: int) -> int:
        with _lanes:
            return http.read_into(quoted, offset + start, buffer[start : start + _PIECE], stamp)

    return sum(_all_of(piece, starts))


def _all_of(piece: Callable[[int], int], starts: range) -> list[int]:
    if len(starts) < 2:
        return [piece(start) for start in starts]
    pool = ThreadPoolExecutor(min(_LANES, len(starts)))
    try:
        return list(pool.map(piece, starts))
    except KeyboardInterrupt:
        http.give_up()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
