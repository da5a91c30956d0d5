"""A server on 127.0.0.1 that speaks the hub's endpoints, counts what it sends, and fails as it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Seen:
    """One request, as it arrived."""

    server: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0
    status: int = 0


@dataclass
class Model:
    """A repository: commit → files, and which commit a branch means."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False


Fault = Callable[["_Handler", Seen], bool]  # answers the request itself and says so, or leaves it


@dataclass
class HubServer:
    """The hub and the server that it sends large files from, which is another origin.

    Attributes:
        models: id → repository.
        plain: path → content, of a plain server at the second address.
        seen: all requests, in order.
        generation: which links are valid; those of before have expired.
        faults: asked in turn for every request; the first that answers it ends it.
        latency: seconds before every answer.
    """

    models: dict[str, Model] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    generation: int = 0
    latency: float = 0.0

    def __enter__(self) -> HubServer:
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo: str, folder: Path, branch: str = "main") -> str:
        """The files of a folder as the newest commit of a branch."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        commit = hashlib.sha1(repr(sorted((name, sha(body)) for name, body in files.items())).encode()).hexdigest()
        model = self.models.setdefault(repo, Model({}, {}))
        model.commits[commit] = files
        model.branches[branch] = commit
        return commit

    def requests(self, suffix: str = "") -> list[Seen]:
        """What was asked for files with this suffix."""
        return [seen for seen in self.seen if urlsplit(seen.path).path.endswith(suffix)]


@cache
def sha(body: bytes) -> str:
    """By which the hub knows a large file."""
    return hashlib.sha256(body).hexdigest()


@cache
def blob(body: bytes) -> str:
    """By which git knows a small one."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@cache
def md5(body: bytes) -> str:
    """By which the second server knows it."""
    return hashlib.md5(body).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, name: str) -> None:
        self.hub, self.name = hub, name
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        seen = Seen(self.server.name, self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        hub.seen.append(seen)
        time.sleep(hub.latency)
        self.told = seen
        if any(fault(self, seen) for fault in list(hub.faults)):
            return
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._info(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups())
        elif self.server.name == "cdn" and path.startswith("/blobs/"):
            self._blob(path.removeprefix("/blobs/"))
        elif path in hub.plain:
            self.give(hub.plain[path], blob(hub.plain[path]))
        else:
            self.say(404)

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        model = self.server.hub.models.get(repo)
        if model is None:
            self.say(401, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = model.branches.get(revision, revision)
        if commit not in model.commits:
            self.say(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, model.commits[commit]

    def _info(self, repo: str, revision: str) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        siblings = []
        for name, body in found[1].items():
            entry = {"rfilename": name, "size": len(body), "blobId": blob(body)}
            if is_large(name):
                entry["lfs"] = {"sha256": sha(body), "size": len(body), "pointerSize": 134}
            siblings.append(entry)
        self.say(200, {"Content-Type": "application/json"}, json.dumps(
            {"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "tags": [], "private": False}
        ).encode())  # fmt: skip

    def _tree(self, repo: str, revision: str) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        entries = []
        for name, body in found[1].items():
            entry = {"type": "file", "path": name, "size": len(body), "oid": blob(body)}
            if is_large(name):
                entry["lfs"] = {"oid": sha(body), "size": len(body), "pointerSize": 134}
            entries.append(entry)
        self.say(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        commit, files = found
        if self.server.hub.models[repo].gated and not self.headers.get("Authorization"):
            self.say(401, {"X-Error-Code": "GatedRepo"})
        elif name not in files:
            self.say(404, {"X-Error-Code": "EntryNotFound"})
        elif is_large(name):
            hub, body = self.server.hub, files[name]
            link = f"{hub.cdn}/blobs/{repo}/{commit}/{name}?sig=secret{hub.generation}"
            self.say(302, {"Location": link, "X-Linked-ETag": f'"{sha(body)}"', "X-Linked-Size": str(len(body)),
                           "X-Repo-Commit": commit})  # fmt: skip
        else:
            self.give(files[name], blob(files[name]), {"X-Repo-Commit": commit})

    def _blob(self, path: str) -> None:
        signature = parse_qs(urlsplit(self.path).query).get("sig", [""])[0]
        if signature != f"secret{self.server.hub.generation}":
            self.say(403)
            return
        owner, name, commit, file = path.split("/", 3)
        body = self.server.hub.models[f"{owner}/{name}"].commits[commit][file]
        self.give(body, md5(body))

    def give(
        self, body: bytes, tag: str, more: dict[str, str] | None = None, *, ranges: bool = True, keep: int | None = None
    ) -> None:
        """A file or the range of it that is asked for; of the body `keep` bytes before the connection is cut."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if ranges else None
        head, status = {"ETag": f'"{tag}"', **(more or {})}, 200
        if found:
            first, last = int(found[1]), min(int(found[2]), len(body) - 1)
            if first >= len(body):
                self.say(416, {"Content-Range": f"bytes */{len(body)}"})
                return
            head["Content-Range"], status = f"bytes {first}-{last}/{len(body)}", 206
            body = body[first : last + 1]
        self.say(status, head, body, keep=keep)

    def say(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", keep: int | None = None
    ) -> None:
        """An answer."""
        self.told.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(OSError):
            for start in range(0, len(body) if keep is None else keep, 2**16):
                chunk = body[start : min(start + 2**16, len(body) if keep is None else keep)]
                self.wfile.write(chunk)
                self.told.sent += len(chunk)
            if keep is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
