"""A model of the Hugging Face hub onto this machine: weights and json only, and every failure as one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from spectra.errors import NotFoundError

BUSY = {408, 425, 429, 500, 502, 503, 504}  # what a server answers that may do better the next time
_TIMEOUT = 5.0  # seconds for the first answer; once it has come, the hub is there
_WEIGHTS_AND_JSON = ["*.safetensors", "*.json", "*.bin"]
_STALLED = (
    "the download stalled again and again; run the same again, it goes on ($HF_HUB_DOWNLOAD_TIMEOUT waits longer)"
)
# What the client says in several lines, by the class of its error.
SAID = {
    "GatedRepoError": "it is gated: accept its terms on the hub, then `hf auth login`",
    "RepositoryNotFoundError": "the hub has no such model, or it is private: `hf auth login`",
    "RevisionNotFoundError": "the hub has the model, but not this revision",
}


def download(repo: str, revision: str, only: Collection[str] | None = None) -> Path:
    """The folder with the model's weights and json files, fetched where they are not there yet.

    Args:
        repo: the model's id.
        revision: a branch, tag or commit.
        only: the files of weights that are wanted; None for all.

    The hub has to answer within 5 s, or $HF_HUB_ETAG_TIMEOUT.

    Raises:
        NotFoundError: it cannot be had; the message says why, without naming the model.
    """
    client, errors = library()
    listing = info(repo, revision)
    try:
        files = [file.rfilename for file in listing.siblings or ()]
        wanted = _WEIGHTS_AND_JSON[:2] if any(file.endswith(".safetensors") for file in files) else _WEIGHTS_AND_JSON
        wanted = wanted if only is None else [*map(escape, only), "*.json"]
        there = client.snapshot_download(repo, revision=revision, allow_patterns=wanted, etag_timeout=_seconds())
    except _families(errors) as problem:
        stalled = any("Timeout" in cls.__name__ for cls in type(problem).__mro__)  # the hub itself has answered
        raise NotFoundError(_STALLED if stalled else _reason(problem, _seconds())) from None
    return Path(there)


def info(repo: str, revision: str, endpoint: str | None = None) -> Any:
    """What the hub says of a model at a revision: its commit, and its files with sizes and hashes.

    Raises:
        NotFoundError: it says nothing; the message says why, without naming the model.
        HfHubHTTPError: it is busy.
    """
    client, errors = library()
    try:
        return client.HfApi(endpoint=endpoint).model_info(
            repo, revision=revision, timeout=_seconds(), files_metadata=True
        )
    except _families(errors) as problem:
        response = getattr(problem, "response", None)
        if endpoint is not None and response is not None and response.status_code in BUSY:
            raise
        raise NotFoundError(_reason(problem, _seconds())) from None


def library() -> tuple[ModuleType, ModuleType]:
    """huggingface_hub and its errors.

    Raises:
        NotFoundError: it is not installed, or the user forbids the hub.
    """
    if offline():
        raise NotFoundError("HF_HUB_OFFLINE is set")
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors  # noqa: F401 (constants is an attribute from then on)
    except ImportError:
        raise NotFoundError("huggingface_hub is missing: pip install 'weight-spectra[hub]'") from None
    return huggingface_hub, errors


def offline() -> bool:
    """Whether the user forbids the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _seconds() -> float:
    try:
        return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _TIMEOUT)
    except ValueError:
        return _TIMEOUT


def _families(errors: ModuleType) -> tuple[type[Exception], ...]:
    """All errors that a download can end in: the hub's, those of the HTTP client behind it, and the built-in ones.

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


def _reason(problem: Exception, timeout: float) -> str:
    """What went wrong, in one line."""
    classes = [cls.__name__ for cls in type(problem).__mro__]
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    for name in classes:
        if name in SAID:
            return SAID[name]
    if any("Timeout" in name for name in classes):
        return f"{hub} gave no answer within {timeout:g} s"
    said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    proxy = by_proxy(hub)
    return f"{hub} cannot be reached{proxy}: {said}" if any("Connect" in name for name in classes) else said + proxy


def by_proxy(url: str) -> str:
    """Which of the user's proxies a request goes through, to say in a message; "" for none."""
    parts = urlsplit(url)
    names = (f"{parts.scheme}_proxy", "all_proxy")
    given = [name for lower in names for name in (lower, lower.upper()) if os.environ.get(name)]
    if not given:
        return ""
    from urllib.request import proxy_bypass  # brings ssl and a client along, for which no listing waits

    return "" if proxy_bypass(parts.netloc) else f" by way of the proxy in ${given[0]}"
