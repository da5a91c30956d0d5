"""Models that are not on this disk: of the hub, at one commit, and below a URL. Only what is asked for is read.

The paths are the URLs of the files, and so are those in recipes: a process on another machine reads for itself, under
the same commit and the same version of every file.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from spectra.errors import NotFoundError, SourceError
from spectra.files import download, http, snapshots
from spectra.files.choice import KNOWN_NAMES, WEIGHT_SUFFIXES
from spectra.files.client import endpoint, offline
from spectra.files.cloud import Cloud, open_cloud
from spectra.files.far import Far, look_anew
from spectra.files.lanes import LANES, Sink, lanes
from spectra.files.storage import Place, Stamp

_ABSENT_FOR = 30.0  # seconds for which a file that was not there is not asked for again
_PAGE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/]+)(?P<rest>/.*)?)?/?")
_RESOLVED = re.compile(r"(?P<hub>.+?)/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<commit>[0-9a-f]{40})(?:/(?P<file>.*))?")
_CACHED = re.compile(r"/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<file>.*))?$")
_HUBS = ("https://huggingface.co", "https://hf.co")

_listings: dict[Hub, dict[str, Stamp]] = {}
meant: dict[Hub, set[str]] = {}  # the branches and tags that meant a commit when it was asked for
_pins: dict[str, Stamp] = {}
_absent: dict[str, float] = {}


@dataclass(frozen=True)
class Hub(Far):
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
        stamp = self._listing().get(self._name(path))
        if stamp is None:
            raise NotFoundError(f"{path} is not among the files of {self.repo}")
        return stamp

    def piece(self, path: str, offset: int, buffer: Sink, stamp: Stamp) -> int:
        """As `Far.piece`."""
        return http.read_into(f"{self.root}/{quote(self._name(path))}", offset, buffer, stamp)

    def local_path(self, path: str) -> str | None:
        """Where the cache has the file, whole."""
        name = self._name(path)
        stamp = self._listing().get(name)
        file = snapshots.cache() / f"models--{self.repo.replace('/', '--')}" / "snapshots" / self.commit / name
        return str(file) if stamp and file.is_file() and file.stat().st_size == stamp[0] else None

    def _name(self, path: str) -> str:
        name = path.removeprefix(self.root).strip("/")
        return name if name in self._listing() else unquote(name)  # a name may hold a percent sign of its own

    def _inside(self, folder: str) -> str:
        name = self._name(folder)
        return f"{name}/" if name else ""

    def _listing(self) -> dict[str, Stamp]:
        if self not in _listings:
            open_hub(self.repo, self.commit, self.endpoint)
        return _listings[self]


@dataclass(frozen=True)
class Web(Far):
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

        with ThreadPoolExecutor(LANES) as pool:
            present = [
                name for name, is_there in zip(KNOWN_NAMES, pool.map(there, KNOWN_NAMES), strict=True) if is_there
            ]
        if not present and refused:
            raise SourceError(refused[0])
        if not present:
            raise NotFoundError(f"{folder} has none of the names that models have, and a server lists no others: "
                                "name the file of weights")  # fmt: skip
        return sorted(present)

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

    def piece(self, path: str, offset: int, buffer: Sink, stamp: Stamp) -> int:
        """As `Far.piece`."""
        try:
            return http.read_into(quote(path, safe=":/%"), offset, buffer, stamp)
        except http.ChangedError:
            _pins.pop(path, None)  # whoever opens it again gets what is there now
            raise

    def _find(self, url: str) -> Stamp | None:
        if url in _pins:
            return _pins[url]
        if time.monotonic() - _absent.get(url, -_ABSENT_FOR) < _ABSENT_FOR:
            return None
        try:
            with lanes:
                stat = http.stat(url)
        except http.AbsentError:
            _absent[url] = time.monotonic()
            return None
        return _pins.setdefault(url, stat)


WEB = Web()


def open_hub(repo: str, revision: str, hub: str | None = None) -> Place:
    """The folder of a model at the commit that a branch, tag or commit means now.

    Raises:
        NotFoundError: the hub does not give it; the message says why, without naming the model.
    """
    at = hub or endpoint()
    info = http.retried(at, lambda: download.info(repo, revision, at))
    storage = Hub(at, repo, info.sha)
    meant.setdefault(storage, set()).add(revision)
    _listings[storage] = {file.rfilename: _stamp_of(storage, file) for file in info.siblings or ()}
    return Place(storage, storage.root)


def _stamp_of(storage: Hub, file: Any) -> Stamp:
    tag = file.lfs.sha256 if file.lfs else file.blob_id
    if file.size is None or not tag:
        raise NotFoundError(f"{storage.endpoint} does not say which version of {file.rfilename} it has")
    return (file.size, tag)


def is_url(text: str) -> bool:
    """Whether what the user typed is the address of something on a server."""
    return re.match(r"[a-z][a-z0-9+.-]+://", text) is not None


def open_url(url: str) -> Place:
    """The folder or file at a URL, looked at anew; the pages of a model on the hub mean the model.

    Raises:
        SourceError: the URL holds a password or a query.
        NotFoundError: it is a page of the hub, and the hub does not give the model; or fsspec finds nothing there.
    """
    _refuse_secrets(url)
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Place.of(unquote(parts.path))
    if parts.scheme == "hf":
        return _of_page(f"{endpoint()}/{_as_page(url)}", endpoint())
    if parts.scheme not in ("http", "https"):
        return open_cloud(url.rstrip("/"))
    if offline():
        raise NotFoundError(f"{url} is not on this machine, and HF_HUB_OFFLINE is set")
    plain = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    for hub in (endpoint(), *_HUBS):
        if plain.startswith(f"{hub}/"):
            return _of_page(plain, hub)
    for known in (_pins, _absent):
        for path in [path for path in known if path.startswith(plain)]:
            known.pop(path, None)
    look_anew(plain)
    return Place(WEB, plain)


def _refuse_secrets(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SourceError(f"the URL of {parts.hostname} holds a password, which results would keep: leave it out")
    if parts.query not in ("", "download=true"):
        raise SourceError(f"{url.partition('?')[0]}?… has a query, which results would keep: pass a URL without")


def _of_page(page: str, hub: str) -> Place:
    """The model, or the file of it, that a page of the hub is about."""
    found = _PAGE.fullmatch(page.removeprefix(f"{hub}/"))
    if found is None or found["repo"].startswith(("datasets/", "spaces/")):
        raise NotFoundError(f"{page} is no page of a model on the hub: pass its id, org/name")
    place = open_hub(found["repo"], unquote(found["revision"] or "main"))
    rest = (found["rest"] or "").strip("/")
    return place / rest if rest else place


def _as_page(url: str) -> str:
    """fsspec's hf://org/name[@revision][/file] as the page that says the same.

    >>> _as_page("hf://org/name@v1/model.safetensors"), _as_page("hf://org/name")
    ('org/name/tree/v1/model.safetensors', 'org/name/tree/main')
    """
    org, _, rest = url.removeprefix("hf://").rstrip("/").partition("/")
    name, slash, inner = rest.partition("/")
    name, _, revision = name.partition("@")
    return f"{org}/{name}/tree/{revision or 'main'}{slash}{inner}"


def place_of(path: str) -> Place:
    """The place that a stored path of this kind means, without looking whether it is there."""
    if not path.startswith(("http://", "https://")):
        return Place(Cloud(path.partition("://")[0]), path)
    match = _RESOLVED.fullmatch(path)
    return Place(Hub(match["hub"], match["repo"], match["commit"]) if match else WEB, path)


def model_of(path: str) -> str:
    """The id of the model of the hub that the address of a folder or file belongs to; "" for any other.

    >>> model_of("https://huggingface.co/org/name/resolve/" + 40 * "a")
    'org/name'
    """
    match = _RESOLVED.fullmatch(path)
    return match["repo"] if match else ""


def file_of(path: str) -> str:
    """The name of a file in its model on the hub, from its address; "" for any other address.

    >>> file_of("https://huggingface.co/org/name/resolve/" + 40 * "a" + "/unet/model.safetensors")
    'unet/model.safetensors'
    """
    match = _RESOLVED.fullmatch(path)
    return unquote(match["file"] or "") if match else ""


def commit_of(address: str) -> str:
    """What commit of which model of the hub an address or a folder of the hub's cache is; "" for any other.

    >>> commit_of("/cache/models--org--name/snapshots/" + 40 * "a" + "/unet") == "org/name@" + 40 * "a" + "/unet"
    True
    """
    found = _CACHED.search(address) or _RESOLVED.fullmatch(address)
    if not found:
        return ""
    said = found.groupdict()
    repo = said["repo"] if "hub" in said else f"{said['org']}/{said['name']}"
    return f"{repo}@{said['commit']}/{unquote(said['file'] or '')}".rstrip("/")


def _is_a_file(url: str) -> bool:
    return Path(urlsplit(url).path).suffix in (*WEIGHT_SUFFIXES, ".json", ".yaml")
