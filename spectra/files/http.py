"""Byte ranges over HTTP: redirected, retried and held to one version of the file; every failure is one sentence.

The requests are made by the session of huggingface_hub, which brings the user's proxies, certificates and offline
switch. Its own retries start a transfer anew; here a broken one goes on where it stopped.
Reference: RFC 9110, §13.1.5 and §14 (conditional and range requests), §10.2.3 (Retry-After).
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from spectra.errors import NotFoundError, SourceError
from spectra.files.client import endpoint, library, offline, session
from spectra.files.download import BUSY
from spectra.files.lanes import Sink
from spectra.files.patience import Patience, TryAgainError, answered, in_time, origin
from spectra.files.refusals import CODES, GatedError, by_proxy, is_final, of_a_token, of_the_hub, on_the_way
from spectra.files.storage import Stamp
from spectra.files.versions import tells_content

_TIMEOUT = 10.0  # seconds of silence after which a request is made again
_HOPS = 5
_SKIPPED = 16 * 2**20  # bytes that are read past where a server sends the whole file instead of a range
_EXPIRED = {400, 401, 403, 404, 410}  # what servers of links that expire say of one that did
_CONFUSED = 3  # attempts after which a server that answers with other ranges is believed to mean it
_BY_HAND = "download it and pass the path"
_CONTRADICTED = "{}: the server sends more or other bytes than the range that it names: " + _BY_HAND
_REDIRECTS = {301, 302, 303, 307, 308}
_NUMBER = re.compile(r"\d{1,19}")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)")

_links: dict[str, _Link] = {}
_tags: dict[tuple[str, str], str] = {}  # URL, what the hub calls the file → what the server that it leads to calls it
_met: set[str] = set()  # URLs that gave bytes to this process
_lock = threading.Lock()
_received = 0


@dataclass(frozen=True)
class _Link:
    """Where a URL leads for now, under which version its bytes are served there, and what the hub calls the file."""

    location: str
    version: str
    linked: str


@dataclass(frozen=True)
class _Answer:
    """A response with bytes of a file, and the version of the file."""

    response: Any
    version: str


class ChangedError(SourceError):
    """The file at a URL is not the one whose header was read."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} changed after it was opened; run the command again")


class AbsentError(NotFoundError):
    """The server has no such file."""


def received() -> int:
    """How many bytes of bodies this process has read so far."""
    return _received


def count(received: int) -> None:
    """Bytes that came by another way, for `received`."""
    global _received
    with _lock:
        _received += received


def stat(url: str, *, first: float | None = None) -> Stamp:
    """Size and version (ETag, or else the date of the last change) of the file at a URL, from a request for one byte.

    Raises:
        NotFoundError: there is none.
        SourceError: the server cannot be reached, refuses, or says too little.
    """
    patience = Patience(url, first)
    while True:
        try:
            with _answer(url, 0, 0) as answer:
                size, version = _size(answer.response), answer.version
                if _is_of_this_second(answer.response, (size or 0, version)):
                    raise TryAgainError("it changes again and again", 1.1, most=_CONFUSED)
                break
        except TryAgainError as problem:
            patience.wait(problem)
    if size is None or not version:
        raise SourceError(
            f"{url}: the server tells {'no size' if size is None else 'neither an ETag nor when it last changed'}, so "
            "nothing would tell that the file changes while it is read: download it and pass the path"
        )
    return (size, version)


def read_into(url: str, offset: int, buffer: Sink, stamp: Stamp) -> int:
    """Fill the buffer from `offset` on with bytes of the version that the stamp names; fewer where the file ends.

    Raises:
        SourceError: the file is another one now, or the bytes cannot be had in the time that is given.
    """
    wanted = min(len(buffer), max(stamp[0] - offset, 0))
    filled, patience = 0, Patience(url)
    while filled < wanted:
        try:
            if offset and url not in _met:  # no header that would tell: a second answer has to agree with the first
                with _answer(url, 0, 0, stamp):
                    pass
            for chunk in _range(url, offset + filled, offset + wanted, stamp):
                buffer[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
                patience.renew(len(chunk))
            if filled < wanted:
                raise TryAgainError("the answer ended early")
        except TryAgainError as problem:
            patience.wait(problem)
    return filled


def retried(url: str, ask: Any) -> Any:
    """What a request of the client library gives, made again where the server is busy.

    Raises:
        SourceError: the server stays busy.
    """
    patience = Patience(url)
    while True:
        try:
            with in_time(_hang_up):
                return ask()
        except library()[1].HfHubHTTPError as problem:
            response = problem.response
            if response is None or response.status_code not in BUSY:
                raise
            patience.answered()
            failed = TryAgainError(f"the server answered {response.status_code}", _asked_to_wait(response.headers))
        except TryAgainError as problem:
            failed = problem
        patience.wait(failed)


def _range(url: str, start: int, stop: int, stamp: Stamp) -> Iterator[bytes]:
    """The bytes of a file from `start` to before `stop`, in the pieces in which they come."""
    with _answer(url, start, stop - 1, stamp) as answer:
        skip = _to_skip(answer.response, url, start, stop, stamp)
        left, promised = stop - start, _promised(answer.response)
        for chunk in _body(answer.response):
            count(len(chunk))
            promised -= len(chunk)
            if promised < 0:
                raise SourceError(_CONTRADICTED.format(url))
            skip, chunk = max(skip - len(chunk), 0), chunk[skip:]
            if chunk:
                yield chunk[:left]
                left -= len(chunk[:left])
            if not left and promised > 0:
                return  # else the end has to come, or what came is not what was promised


def _promised(response: Any) -> float:
    """How many bytes an answer says that its body has; of a whole file, whatever comes."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(match[2]) - int(match[1]) + 1 if response.status_code == 206 and match and match[1] else float("inf")


def _body(response: Any) -> Iterator[bytes]:
    try:
        yield from response.iter_raw()
    except _transport_error() as problem:
        raise TryAgainError(on_the_way(problem, _TIMEOUT)) from None


def _to_skip(response: Any, url: str, start: int, stop: int, stamp: Stamp) -> int:
    """How many bytes of the body come before what was asked for."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SourceError(f"{url}: the server compresses what it sends, so ranges mean nothing: download the file")
    if _size(response) not in (None, stamp[0]):
        _forget(url)
        raise ChangedError(url)
    if response.status_code == 200:
        if stop > max(_SKIPPED, stop - start):
            raise SourceError(f"{url}: the server sends whole files only, not ranges: download it and pass the path")
        return start
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not match or match[1] is None or not int(match[1]) <= start <= int(match[2]):
        raise TryAgainError(f"the answer is another range than was asked for: {_BY_HAND}", most=_CONFUSED)
    length = response.headers.get("Content-Length", "")
    if _NUMBER.fullmatch(length) and int(length) > _promised(response):
        raise SourceError(_CONTRADICTED.format(url))
    return start - int(match[1])


@contextmanager
def _answer(url: str, first: int, last: int, stamp: Stamp | None = None) -> Iterator[_Answer]:
    """The response with the bytes of a range, redirects followed and errors raised; links that expire are renewed."""
    if offline():
        raise NotFoundError(f"{url} is not on this machine, and HF_HUB_OFFLINE is set")
    link = _links.get(url)
    target, linked = (link.location, link.linked) if link else (url, "")
    for _ in range(_HOPS + 1):
        headers = {**_headers(target), "Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        with _streamed(url, target, headers) as response:
            answered.add(origin(target))
            linked = _plain(response.headers.get("X-Linked-ETag", "")) or linked
            if response.status_code in _REDIRECTS and "Location" in response.headers:
                target = _next(url, target, response.headers["Location"])
                continue
            _check_status(url, target, response, renewable=link is not None)
            served = _version(response)
            _check_version(url, linked or served, stamp)
            if link is not None and link.version != served:
                _forget(url)  # the hub has to say again that this is the file
                raise TryAgainError("what its link leads to changed", 0.0)
            if linked and served != linked:
                _check_tag(url, linked, served)
            if target != url:
                _links[url] = _Link(target, served, linked)
            _met.add(url)
            yield _Answer(response, linked or served)
            return
    raise SourceError(f"{url} leads from one address to the next without end; pass the address of the file")


@contextmanager
def _streamed(url: str, target: str, headers: dict[str, str]) -> Iterator[Any]:
    client = session()
    try:
        stream = client.stream("GET", target, headers=headers, follow_redirects=False, timeout=_TIMEOUT)
        with in_time(_hang_up):
            response = stream.__enter__()
    except (_transport_error(), RuntimeError) as problem:  # RuntimeError: another thread closed the session
        _forget(url)  # another link may lead to a server that answers
        said = on_the_way(problem, _TIMEOUT) + by_proxy(target)
        if is_final(problem):
            raise SourceError(f"{_asked(url, target)} cannot be read: {said}") from None
        raise TryAgainError(said) from None
    except (OSError, ValueError, _no_url()) as problem:
        raise SourceError(f"{url} cannot be read: {on_the_way(problem, _TIMEOUT)}") from None
    try:
        yield response
    finally:
        stream.__exit__(None, None, None)


def _asked(url: str, target: str) -> str:
    """An address, and the server that it leads to, where that is another."""
    return url if origin(url) == origin(target) else f"{url}, which leads to {_server(target)},"


def _server(target: str) -> str:
    return urlsplit(target).netloc.rpartition("@")[2]


def _hang_up() -> None:
    """End every request of this process: one of them has headers without end, and the others are made again."""
    library()[0].close_session()


def _check_version(url: str, version: str, stamp: Stamp | None) -> None:
    """Raise if what is served is not the version whose header was read."""
    if stamp is not None and version != stamp[1]:
        _forget(url)
        raise ChangedError(url)


def _check_tag(url: str, linked: str, served: str) -> None:
    """Raise unless the server that the hub leads to calls a file as it first did: the two names cannot be compared."""
    if not served:
        _forget(url)
        raise TryAgainError(f"the server that the hub leads to tells no version of it: {_BY_HAND}", most=_CONFUSED)
    if _tags.setdefault((url, linked), served) != served:
        _forget(url)
        raise TryAgainError(
            "the server that the hub leads to has another version than before; run the command again", most=_CONFUSED
        )


def _check_status(url: str, target: str, response: Any, *, renewable: bool) -> None:
    """Raise for everything but the bytes."""
    status = response.status_code
    if status in (200, 206) or (status == 416 and _size(response) == 0):
        return
    if renewable and status in _EXPIRED:
        _forget(url)
        raise TryAgainError(f"its link expired ({status})", 0.0)
    if status in (401, 403) and target != url and origin(target) != origin(endpoint()):
        raise TryAgainError(_no_access(url, target, status), most=2)  # signed links may be refused for a moment
    if status in BUSY:
        raise TryAgainError(f"the server answered {status}", _asked_to_wait(response.headers))
    if status == 416:
        _forget(url)
        raise ChangedError(url)
    if status in (401, 403):
        code = CODES.get(response.headers.get("X-Error-Code", ""), "")
        refused = GatedError if code == "GatedRepoError" else NotFoundError
        raise refused(f"{url}: {of_the_hub(code) or _no_access(url, target, status)}")
    if status in (404, 410):
        raise AbsentError(f"{url}: there is no such file ({status})")
    raise SourceError(f"{url} cannot be read: the server answered {status}{by_proxy(target)}")


def _no_access(url: str, target: str, status: int) -> str:
    if origin(target) == origin(endpoint()):
        if status == 401:
            return of_a_token()
        return f"the hub refuses it ({status}): ask for access on the model's page, then `hf auth login`"
    if target != url:
        return f"the server that it leads to, {_server(target)}, refuses it ({status})"
    return f"the server refuses it ({status}), and no password or token is sent to it: download it and pass the path"


def _next(url: str, target: str, location: str) -> str:
    """Where a redirect leads."""
    try:
        address = urljoin(target, location)
        scheme, host, _ = urlsplit(address).scheme, urlsplit(address).hostname, urlsplit(address).port
    except ValueError:
        scheme, host = "", None
    if scheme not in ("http", "https") or not host:
        raise SourceError(f"{url} leads to what is no address of a server; pass the address of the file")
    if urlsplit(target).scheme == "https" and scheme != "https":
        raise SourceError(f"{url} leads to an address without encryption, which is not followed")
    return address


def _headers(target: str) -> dict[str, str]:
    """The headers of a request; the user's token goes to the hub and nowhere else."""
    ours = origin(target) == origin(endpoint())
    library()
    from huggingface_hub.utils import build_hf_headers

    headers: dict[str, str] = build_hf_headers(token=None if ours else False, library_name="spectra")
    return headers


def _forget(url: str) -> None:
    _links.pop(url, None)


def _version(response: Any) -> str:
    return _plain(response.headers.get("ETag") or response.headers.get("Last-Modified", ""))


def _plain(tag: str) -> str:
    """An ETag without its quotes; a weak one names the same version here, since nothing is decoded on the way."""
    return tag.removeprefix("W/").strip('"')


def _is_of_this_second(response: Any, stamp: Stamp) -> bool:
    """Whether the date that the file's version amounts to is this second: a change yet to come would have the same.

    Reference: RFC 9110, §8.8.2.2.
    """
    changed = response.headers.get("Last-Modified", "")
    return changed != "" and changed == response.headers.get("Date") and not tells_content(stamp)


def _size(response: Any) -> int | None:
    """The size of the whole file, as the answer to a range tells it."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match:
        return None if match[3] == "*" else int(match[3])
    length = response.headers.get("Content-Length", "") if response.status_code == 200 else ""
    return int(length) if _NUMBER.fullmatch(length) else None


def _asked_to_wait(headers: Any) -> float | None:
    """Seconds that a server asks for: Retry-After in seconds or as a date."""
    from email.utils import parsedate_to_datetime  # a third of this file's time to import, for every look at headers

    said = headers.get("Retry-After", "").strip()
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _client() -> Any:
    """The HTTP client behind the hub's session."""
    return sys.modules[type(session()).__module__.partition(".")[0]]


def _transport_error() -> type[Exception]:
    """What it raises where a request does not come through."""
    error: type[Exception] = _client().TransportError
    return error


def _no_url() -> type[Exception]:
    """What it raises where it is told to ask what is no URL."""
    error: type[Exception] = _client().InvalidURL
    return error
