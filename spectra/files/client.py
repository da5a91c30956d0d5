"""huggingface_hub, the client library: whether it may be asked, its session, and what its logs must not tell."""

from __future__ import annotations

import logging
import os
import re
import sys
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from spectra.errors import NotFoundError

_LINK = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]+")
_TALKERS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3")  # packages that log addresses
_SETTINGS = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


def library() -> tuple[ModuleType, ModuleType]:
    """huggingface_hub and its errors.

    Raises:
        NotFoundError: it is not installed, its settings are none, or the user forbids the hub.
    """
    if offline():
        raise NotFoundError("HF_HUB_OFFLINE is set")
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors  # noqa: F401 (constants is an attribute from then on)
    except ImportError:
        raise NotFoundError("huggingface_hub is missing: pip install 'weight-spectra[hub]'") from None
    except ValueError as problem:  # it reads its settings when it is imported
        given = sorted(f"${name}" for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_")))
        raise NotFoundError(
            f"huggingface_hub cannot use its settings ({first_line(problem)}); look at {', '.join(given)}"
        ) from None
    return huggingface_hub, errors


def offline() -> bool:
    """Whether the user forbids the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def endpoint() -> str:
    """The hub: `$HF_ENDPOINT`, or what huggingface_hub says.

    Raises:
        NotFoundError: it is no address of a server, or holds a password.
    """
    address = str(os.environ.get("HF_ENDPOINT") or library()[0].constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(address)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise NotFoundError("$HF_ENDPOINT is no address of a server: set it to one such as https://huggingface.co")
    if "@" in parts.netloc:
        raise NotFoundError(f"$HF_ENDPOINT ({parts.hostname}) holds a password, which results would keep: leave it out")
    return address


def session() -> Any:
    """The session that makes the requests, with the user's proxies and certificates; its logs tell no signed links.

    Raises:
        NotFoundError: none can be made with these proxies or certificates.
    """
    client, errors = library()
    keep_links_secret()
    failures: tuple[type[Exception], ...] = (ImportError, *families(errors))
    try:
        return client.get_session()
    except failures as problem:
        given = [f"${name}" for name in _SETTINGS for name in (name, name.lower()) if os.environ.get(name)]
        looked_at = f"; look at {', '.join(given)}" if given else ""
        if isinstance(problem, ImportError) and "socks" in str(problem).lower():
            raise NotFoundError(f"a SOCKS proxy needs a package: pip install socksio{looked_at}") from None
        raise NotFoundError(
            f"no connection can be set up with this machine's settings: {without_links(first_line(problem))}{looked_at}"
        ) from None


def families(errors: ModuleType) -> tuple[type[Exception], ...]:
    """All errors that a request can end in: the hub's, those of the HTTP client behind it, and the built-in ones.

    Which client that is (requests, httpx or a successor) depends on the version, and not all of its errors are an
    OSError; the hub's own HTTP error is derived from one of them and so names it.
    """
    client = {cls.__module__.partition(".")[0] for cls in errors.HfHubHTTPError.__mro__} - {"builtins"}
    modules = [errors, *(sys.modules[name] for name in client if name in sys.modules)]
    theirs = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    return (*theirs, OSError, ValueError, RuntimeError, LookupError, TypeError)  # the last of answers that are none


def sends_a_token() -> bool:
    """Whether a token of the user's goes to the hub."""
    from huggingface_hub.utils import build_hf_headers

    return "authorization" in build_hf_headers(library_name="spectra")


def keep_links_secret() -> None:
    """Leave the queries of addresses out of what the libraries log: they sign a link for whoever reads them."""
    for name in list(logging.Logger.manager.loggerDict):
        if name.partition(".")[0] in _TALKERS:
            logging.getLogger(name).addFilter(_leave_out_links)


def without_links(text: str) -> str:
    """A text without the queries of the addresses in it.

    >>> without_links("from https://cdn.example/blob?sig=abc: timed out")
    'from https://cdn.example/blob?… timed out'
    """
    return _LINK.sub(r"\1?…", text)


def first_line(problem: BaseException) -> str:
    """What an error says, in one line."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def _leave_out_links(record: logging.LogRecord) -> bool:
    """Filter of a logger, which lets everything through."""
    try:
        said = record.getMessage()
    except (TypeError, ValueError):
        return True  # the handler will say that it is no message
    if (told := without_links(said)) != said:
        record.msg, record.args = told, ()
    return True
