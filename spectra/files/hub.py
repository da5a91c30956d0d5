"""From what the user typed to a place: an existing path, an alias, or a model of the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from spectra.errors import NotFoundError, SourceError
from spectra.files import remote, snapshots
from spectra.files.choice import WEIGHT_SUFFIXES
from spectra.files.client import offline
from spectra.files.copies import Progress, copy
from spectra.files.download import download
from spectra.files.far import Far
from spectra.files.refusals import GatedError
from spectra.files.storage import Place
from spectra.printing import shortened

# Names that people say → the hub's ids.
ALIASES = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
}
_LONGEST = 400  # characters of what was tried, which may be a path of thousands
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def resolve(
    name: str | Path | Place,
    *,
    fetch: bool = False,
    progress: Progress | None = None,
    only: Collection[str] | None = None,
) -> Place:
    """The folder or file that a path, URL, alias or hub id means; a place means itself.

    Tried in order: a URL; the path; the user's aliases; the folder `$SPECTRA_MODELS`; the built-in aliases;
    the local hub cache; the hub, where huggingface_hub is installed and not offline. What is written as a path is
    looked for as one and nothing else; what leads into a folder that is here is never asked of the hub.

    Args:
        name: one of these.
        fetch: download a model of the hub into its cache, or what a URL leads to into ours, instead of reading there
            what is needed when it is.
        progress: is told how far a download from a URL is.
        only: the addresses of the weight files that a download is for; None for all.

    Raises:
        NotFoundError: nothing was found; the message lists what was tried.
    """
    if isinstance(name, Place):
        return name
    if not str(name).strip():
        raise NotFoundError("an empty name was given instead of a path, hub id or alias; is a shell variable not set?")
    if remote.is_url(str(name)):
        return _of_url(str(name), fetch=fetch, progress=progress, only=only)
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return Place.of(path)
    tried = [f"the path {path}{_how_far(path)}"]
    if _written_as_a_path(str(name)):
        raise _not_found(str(name), [*tried, f"nothing else, since {name} is written as a path"])
    return Place.of(_by_name(str(name), tried, fetch=fetch, only=only))


def _of_url(url: str, *, fetch: bool, progress: Progress | None, only: Collection[str] | None) -> Place:
    place = remote.open_url(url)
    return fetched(place, progress, only) if fetch else place


def pinned(name: str | Path) -> str | Path | Place:
    """A model on a server as the place that its name means now, to be opened several times; any other as it is."""
    place = resolve(name)
    return place if isinstance(place.storage, Far) else name


def fetched(place: Place, progress: Progress | None = None, only: Collection[str] | None = None) -> Place:
    """Where a place on a server lies on this machine once it is downloaded; reading the place reads there, too.

    Args:
        place: a folder or file; one that is on this machine means itself.
        progress: is told how far a download from a URL is.
        only: the addresses of the weight files that are wanted; None for all.
    """
    if not isinstance(place.storage, Far):
        return place
    if isinstance(place.storage, remote.Hub):
        repo, commit = place.storage.repo, place.storage.commit
        try:
            whole = Place.of(download(repo, commit, _names(repo, only)))
        except NotFoundError as problem:
            raise type(problem)(f"{repo}: {problem}") from None
        for revision in remote.meant.get(place.storage, ()):
            snapshots.refer(repo, revision, commit)
        inner = place.path.removeprefix(place.storage.root).strip("/")
        return whole / inner if inner else whole
    return Place.of(copy(place, progress, only))


def _names(repo: str, only: Collection[str] | None) -> list[str] | None:
    """The names that files have in a model on the hub, from the addresses of those and others."""
    return None if only is None else [remote.file_of(each) for each in only if remote.model_of(each) == repo]


def _by_name(name: str, tried: list[str], *, fetch: bool, only: Collection[str] | None) -> Path | Place:
    """The folder or file that an alias or hub id means."""
    text = name
    config = config_file()
    aliases = _user_aliases(config)
    tried.append(f"aliases in {config}{_why_not(config)}")
    if text in aliases:
        target = Path(os.path.expanduser(aliases[text]))
        if os.path.exists(target):
            return target
        if remote.is_url(aliases[text]):
            return _of_url(aliases[text], fetch=fetch, progress=None, only=only)
        text, tried = aliases[text], [*tried, f"its alias {aliases[text]}"]
        if _written_as_a_path(text):
            raise _not_found(name, [*tried, f"nothing else, since {text} is written as a path"])
    models = os.environ.get("SPECTRA_MODELS")
    if models and os.path.exists(Path(os.path.expanduser(models)) / text):
        return Path(os.path.expanduser(models)) / text
    tried.append(f"{models}/{text}" if models else "$SPECTRA_MODELS (not set)")
    if resolve_alias(text) != text:
        tried.append(f"the built-in alias {text} = {resolve_alias(text)}")
        text = resolve_alias(text)
    match = _HUB_ID.fullmatch(text)
    if not match:
        raise _not_found(name, tried)
    repo, revision, meant = match["repo"], match["revision"] or "main", _is_a_path(text)
    return _from_hub(name, repo, revision, tried, meant=meant, fetch=fetch, only=only)


def _written_as_a_path(text: str) -> bool:
    """Whether nobody would write a name, an alias or a hub's id so."""
    return text.startswith((".", "/", "~"))


def _is_a_path(text: str) -> str:
    """Why what could be a hub's id is a path all the same; "" if it is none. A revision says that it is an id."""
    first = text.partition("/")[0]
    if "@" not in text and os.path.exists(first):
        return f"{first} is there, so {text} is a path (write {text}@main for the hub's)"
    return ""


def _how_far(path: Path) -> str:
    """How far a path leads, and what has a similar name there; "" where there is nothing to say."""
    there = next((parent for parent in path.parents if os.path.isdir(parent)), None)
    if there is None:
        return ""
    missing = path.relative_to(there).parts[0]
    if not os.access(there, os.X_OK):
        return f" ({there} cannot be searched by this user)"
    if os.path.isfile(there / missing):
        return f" ({there / missing} is a file)"
    listed = sorted(os.listdir(there)) if os.access(there, os.R_OK) else []
    similar = difflib.get_close_matches(missing, listed, n=3)
    said = [] if there == Path() else [f"{there} is there and holds no {missing}"]
    said += [f"did you mean {' or '.join(str(there / name) for name in similar)}?"] if similar else []
    return f" ({'; '.join(said)})" if said else ""


def resolve_alias(name: str) -> str:
    """The hub id that a built-in alias stands for, or the name itself.

    >>> resolve_alias("llama-7b")
    'huggyllama/llama-7b'
    """
    return ALIASES.get(name.lower(), name)


def config_file() -> Path:
    """The user's config: `$SPECTRA_CONFIG`, or `spectra/config.toml` in the user's config folder."""
    given = os.environ.get("SPECTRA_CONFIG")
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.path.expanduser(given or f"{home}/spectra/config.toml"))


def _why_not(file: Path) -> str:
    """Why a file cannot be looked at, in brackets; "" for one that is there."""
    try:
        return "" if stat.S_ISREG(os.stat(file).st_mode) else " (no file)"
    except FileNotFoundError:
        return " (no such file)"
    except (OSError, ValueError) as problem:
        return f" ({getattr(problem, 'strerror', None) or problem})"


def _not_found(name: str, tried: list[str]) -> NotFoundError:
    return NotFoundError(f"{shortened(name, _LONGEST)!r} was not found. Tried: {'; '.join(_short(it) for it in tried)}")


def _short(text: str) -> str:
    return shortened(text, _LONGEST)


def _user_aliases(config: Path) -> dict[str, str]:
    if _why_not(config):
        return {}
    import tomllib

    try:
        content: dict[str, Any] = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as problem:
        raise SourceError(f"{config} cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise SourceError(f"{config} is not readable TOML: {problem}") from None
    aliases = content.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(value, str) for value in aliases.values()):
        raise SourceError(f'{config}: [aliases] must hold lines such as llama-7b = "/models/llama-7b"')
    return aliases


def _from_hub(
    name: str, repo: str, revision: str, tried: list[str], *, meant: str, fetch: bool, only: Collection[str] | None
) -> Path | Place:
    """A model of the hub: in its cache, or on the hub unless the name is meant as a path."""
    folder = snapshots.cache() / f"models--{repo.replace('/', '--')}"
    try:
        cached = _snapshot(folder, revision)
    except OSError as problem:
        raise SourceError(f"the hub cache {folder} cannot be looked at: {problem.strerror}") from None
    lack = snapshots.missing(Place.of(cached), WEIGHT_SUFFIXES) if cached else ""
    if cached and not lack:
        return cached
    tried.append(f"the hub cache {folder} (revision {revision}{', ' + lack if lack else ''})")
    if cached and (meant or offline()):
        return cached  # opening it says what is missing and how to get it
    if meant:
        raise _not_found(name, [*tried, f"not the hub, since {meant}"])
    try:
        return download(repo, revision, _names(repo, only)) if fetch else remote.open_hub(repo, revision)
    except GatedError as problem:
        raise GatedError(f"{repo}: {problem}") from None
    except NotFoundError as problem:
        asked = f"a download of {repo}" if fetch else f"{repo} on the hub"
        raise _not_found(name, [*tried, f"{asked} ({problem})"]) from None


def _snapshot(folder: Path, revision: str) -> Path | None:
    """The cached snapshot of a branch, tag or commit. Files in it are links to the cache's blobs."""
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshots = folder / "snapshots"
    exact = snapshots / commit
    if exact.is_dir() and any(exact.iterdir()):
        return exact
    short = list(snapshots.glob(f"{commit}*")) if re.fullmatch(r"[0-9a-f]{7,40}", commit) else []
    return short[0] if len(short) == 1 else None
