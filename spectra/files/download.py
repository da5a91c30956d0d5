"""A model of the Hugging Face hub onto this machine: weights and json only, and every failure as one sentence."""

from __future__ import annotations

import os
from collections.abc import Collection
from glob import escape
from pathlib import Path
from typing import Any

from spectra.errors import NotFoundError
from spectra.files.client import endpoint, families, keep_links_secret, library, session
from spectra.files.refusals import GatedError, by_proxy, of_a_token, of_the_hub, on_the_way

BUSY = {408, 425, 429, 500, 502, 503, 504}  # what a server answers that may do better the next time
_TIMEOUT = 5.0  # seconds for the first answer; once it has come, the hub is there
_WEIGHTS_AND_JSON = ["*.safetensors", "*.json", "*.bin"]
_GOES_ON = "run the same again, it goes on where it stopped"


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
        fetch = client.snapshot_download  # which imports what logs
        keep_links_secret()
        there = fetch(repo, revision=revision, allow_patterns=wanted, etag_timeout=_seconds())
    except families(errors) as problem:
        raise _no_download(problem) from None
    return Path(there)


def info(repo: str, revision: str, at: str | None = None) -> Any:
    """What the hub says of a model at a revision: its commit, and its files with sizes and hashes.

    Args:
        at: the hub's address, where being busy is an error of its own; None for the user's.

    Raises:
        NotFoundError: it says nothing; the message says why, without naming the model.
        HfHubHTTPError: it is busy.
    """
    client, errors = library()
    hub = at or endpoint()
    session()
    try:
        return client.HfApi(endpoint=hub).model_info(repo, revision=revision, timeout=_seconds(), files_metadata=True)
    except families(errors) as problem:
        if at is not None and _status(problem) in BUSY:
            raise
        raise _refusal(problem) or NotFoundError(_reason(problem, hub)) from None


def _seconds() -> float:
    try:
        return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _TIMEOUT)
    except ValueError:
        return _TIMEOUT


def _status(problem: Exception) -> int | None:
    """What the server answered, where it did."""
    return getattr(getattr(problem, "response", None), "status_code", None)


def _no_download(problem: Exception) -> NotFoundError:
    """Why a download ended after the hub had told what there is."""
    if (refused := _refusal(problem)) is not None:
        return refused
    classes = {cls.__name__ for cls in type(problem).__mro__}
    if any("Timeout" in name for name in classes):
        return NotFoundError(
            f"the download stalled again and again; {_GOES_ON} ($HF_HUB_DOWNLOAD_TIMEOUT waits longer)"
        )
    if "TransportError" in classes or _status(problem) in BUSY:
        return NotFoundError(f"the download broke off again and again ({on_the_way(problem, _seconds())}); {_GOES_ON}")
    if _status(problem) is not None:
        return NotFoundError(f"the server that the hub leads to answered {_status(problem)}; {_GOES_ON}")
    return NotFoundError(on_the_way(problem, _seconds()))


def _refusal(problem: Exception) -> NotFoundError | None:
    """What the hub refuses, in its own words."""
    names = [cls.__name__ for cls in type(problem).__mro__]
    if said := next((said for name in names if (said := of_the_hub(name))), ""):
        return (GatedError if "GatedRepoError" in names else NotFoundError)(said)
    return NotFoundError(of_a_token()) if _status(problem) == 401 else None


def _reason(problem: Exception, hub: str) -> str:
    """Why the hub says nothing, in one line."""
    classes = [cls.__name__ for cls in type(problem).__mro__]
    said, proxy = on_the_way(problem, _seconds()), by_proxy(hub)
    if any("Timeout" in name for name in classes):
        return f"{hub} gave {said}"
    return f"{hub} cannot be reached{proxy}: {said}" if any("Connect" in name for name in classes) else said + proxy
