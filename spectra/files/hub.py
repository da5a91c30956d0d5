"""From what the user typed to a place: an existing path, an alias, or a model of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from spectra.errors import NotFoundError, SourceError
from spectra.files import snapshots
from spectra.files.choice import WEIGHT_SUFFIXES
from spectra.files.storage import Place

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
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_WEIGHTS_AND_JSON = ["*.safetensors", "*.json", "*.bin"]


def resolve(name: str | Path | Place) -> Place:
    """The folder or file that a path, alias or hub id means; a place means itself.

    Tried in order: the path; the user's aliases; the folder `$SPECTRA_MODELS`; the built-in aliases;
    the local hub cache; a download where huggingface_hub is installed and not offline.

    Raises:
        NotFoundError: nothing was found; the message lists what was tried.
    """
    if isinstance(name, Place):
        return name
    path = Path(name).expanduser()
    return Place.of(path if path.exists() else _by_name(str(name), [f"the path {path}"]))


def _by_name(name: str, tried: list[str]) -> Path:
    """The local folder or file that an alias or hub id means."""
    text = name
    config = config_file()
    aliases = _user_aliases(config)
    tried.append(f"aliases in {config}" + ("" if config.is_file() else " (no such file)"))
    if text in aliases:
        target = Path(aliases[text]).expanduser()
        if target.exists():
            return target
        text, tried = aliases[text], [*tried, f"its alias {aliases[text]}"]
    models = os.environ.get("SPECTRA_MODELS")
    if models and (Path(models).expanduser() / text).exists():
        return Path(models).expanduser() / text
    tried.append(f"{models}/{text}" if models else "$SPECTRA_MODELS (not set)")
    if resolve_alias(text) != text:
        tried.append(f"the built-in alias {text} = {resolve_alias(text)}")
        text = resolve_alias(text)
    found = _HUB_ID.fullmatch(text)
    if found:
        return _from_hub(name, found["repo"], found["revision"] or "main", tried)
    raise _not_found(name, tried)


def resolve_alias(name: str) -> str:
    """The hub id that a built-in alias stands for, or the name itself.

    >>> resolve_alias("llama-7b")
    'huggyllama/llama-7b'
    """
    return ALIASES.get(name.lower(), name)


def config_file() -> Path:
    """The user's config: `$SPECTRA_CONFIG`, or `spectra/config.toml` in the user's config folder."""
    given = os.environ.get("SPECTRA_CONFIG")
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return Path(given).expanduser() if given else home / "spectra" / "config.toml"


def hub_cache() -> Path:
    """Where huggingface_hub keeps its downloads, by its own environment variables."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _not_found(name: str, tried: list[str]) -> NotFoundError:
    return NotFoundError(f"{name!r} was not found. Tried: {'; '.join(tried)}")


def _user_aliases(config: Path) -> dict[str, str]:
    if not config.is_file():
        return {}
    import tomllib

    try:
        content: dict[str, Any] = tomllib.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise SourceError(f"{config} is not readable TOML: {problem}") from None
    aliases = content.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(value, str) for value in aliases.values()):
        raise SourceError(f'{config}: [aliases] must hold lines such as llama-7b = "/models/llama-7b"')
    return aliases


def _from_hub(name: str, repo: str, revision: str, tried: list[str]) -> Path:
    folder = hub_cache() / f"models--{repo.replace('/', '--')}"
    cached = _snapshot(folder, revision)
    lack = snapshots.missing(Place.of(cached), WEIGHT_SUFFIXES) if cached else ""
    if cached and not lack:
        return cached
    tried.append(f"the hub cache {folder} (revision {revision}{', ' + lack if lack else ''})")
    if _truthy("HF_HUB_OFFLINE"):
        if cached:
            return cached  # opening it says what is missing and how to get it
        tried.append("no download, since HF_HUB_OFFLINE is set")
        raise _not_found(name, tried)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        if cached:
            return cached
        tried.append("no download, since huggingface_hub is missing (pip install 'weight-spectra[hub]')")
        raise _not_found(name, tried) from None
    try:
        files = huggingface_hub.list_repo_files(repo, revision=revision)
        wanted = _WEIGHTS_AND_JSON[:2] if any(file.endswith(".safetensors") for file in files) else _WEIGHTS_AND_JSON
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        tried.append(f"a download of {repo} ({first})")
        raise _not_found(name, tried) from None


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


def _truthy(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}
