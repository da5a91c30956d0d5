"""The hub's cache on this machine: `models--org--name` has `refs`, `snapshots` of links, and the `blobs` they lead to.

Reference: huggingface_hub's documentation, "Understand caching".
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from spectra.errors import SourceError
from spectra.files.storage import Place

_REPOSITORY = re.compile(r"models--([^/]+?)--([^/]+)")


def users_cache() -> Path:
    """The user's folder for what can be had again: `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))


def spectras_cache() -> Path:
    """Where what came from servers is kept: `$SPECTRA_CACHE`, or `spectra` in the user's cache folder."""
    given = os.environ.get("SPECTRA_CACHE")
    return Path(given or users_cache() / "spectra").expanduser()


def cache() -> Path:
    """Where huggingface_hub keeps its downloads, by its own environment variables."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(os.path.expanduser(given))
    home = os.environ.get("HF_HOME") or users_cache() / "huggingface"
    return Path(os.path.expanduser(home)) / "hub"


def refer(repo: str, revision: str, commit: str) -> None:
    """Note in the cache that a branch or tag means a commit, as the hub's own downloads by that name do.

    Args:
        repo: the model's id.
        revision: the branch or tag; of a commit there is nothing to note.
        commit: its full name.
    """
    reference = cache() / f"models--{repo.replace('/', '--')}" / "refs" / revision
    if revision == commit or ".." in revision.split("/"):
        return
    with suppress(OSError):  # without it the next command asks the hub
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


def repository(folder: Place) -> str:
    """The hub id that a folder of the cache belongs to, "org/name"; "" for a folder elsewhere.

    >>> repository(Place.of("hub/models--org--name/snapshots/5e0a/unet"))
    'org/name'
    """
    matches = [match for name in folder.path.split("/") if (match := _REPOSITORY.fullmatch(name))]
    return f"{matches[-1][1]}/{matches[-1][2]}" if matches else ""


def dangling(folder: Place) -> list[str]:
    """The names in a folder behind which there is nothing: links to files that were deleted or never came."""
    return [item.name for item in folder.items() if not item.is_file() and not item.is_folder()]


def interrupted(folder: Place) -> int:
    """How many downloads into the cache that a folder belongs to have not ended."""
    names = folder.path.split("/")
    places = [place for place, name in enumerate(names) if _REPOSITORY.fullmatch(name)]
    if not places:
        return 0
    blobs = Place(folder.storage, "/".join(names[: places[-1] + 1])) / "blobs"
    return sum(item.name.endswith(".incomplete") for item in blobs.items()) if blobs.is_folder() else 0


def why_no_weights(folder: Place) -> str:
    """What the cache, or a link in any folder, says of weights that are not there; "" where neither says anything."""
    repo, lost, unfinished = repository(folder), dangling(folder), interrupted(folder)
    if _REPOSITORY.fullmatch(folder.name) or (repo and folder.name == "snapshots"):
        return f"; it is the hub cache of {repo}: pass {repo}, or the path of one of its snapshots"
    said = [f"{', '.join(lost[:4])}{', …' if len(lost) > 4 else ''} leads to a file that is not there"] if lost else []
    if not repo:
        return f"; {said[0]}: download or copy it again" if said else ""
    if unfinished:
        said.append(f"{unfinished} of its downloads did not end (.incomplete)")
    held = "; ".join(said) or "no weights were downloaded"
    return f"; it is the hub cache of {repo}, and {held}: `hf download {repo}` fetches what is missing"


def missing(snapshot: Place, suffixes: tuple[str, ...]) -> str:
    """What a snapshot lacks of its weights; "" if it has weights and nothing says that one of them is lost.

    Args:
        snapshot: its folder.
        suffixes: of weight files.
    """
    files = list(_files(snapshot))
    there = {item.suffix for item in files if item.is_file()} & set(suffixes)
    lost = [item.name for item in files if item.suffix in suffixes and not item.is_file()]
    for index in (item for item in files if item.name.endswith(".index.json") and item.is_file()):
        # Of a format that was not downloaded at all, the index came with the other JSON files.
        shards = [shard for shard in _shards(index) if not there or Place(index.storage, shard).suffix in there]
        lost += [shard for shard in shards if not (index.parent / shard).is_file() and shard not in lost]
    if lost:
        return f"without {', '.join(lost[:4])}{', …' if len(lost) > 4 else ''}"
    held = [item.name for item in files]
    return "" if there else f"with {', '.join(held[:4])}{', …' if len(held) > 4 else ''} and no weights"


def _files(folder: Place) -> list[Place]:
    """What lies in a folder and in the folders in it."""
    items = folder.items()
    inner = [item for folder in items if folder.is_folder() for item in folder.items()]
    return [item for item in (*items, *inner) if not item.is_folder()]


def _shards(index: Place) -> list[str]:
    """The files that an index names; none if it is broken, which opening it says better."""
    try:
        content = json.loads(index.read(0, index.stamp()[0]))
    except (ValueError, RecursionError, SourceError):
        return []
    listed = content.get("weight_map") if isinstance(content, dict) else None
    return sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
