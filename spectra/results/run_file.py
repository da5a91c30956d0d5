"""`run.json`: what was run on what, with a checksum over all that it says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectra.errors import StoreError
from spectra.files.remote import commit_of, is_url
from spectra.results import fingerprint, writing
from spectra.results.shelf import json_text

_CHECKSUM, _BYTES = "checksum", 16
_LARGEST = 512 * 2**20


def read(path: Path) -> dict[str, Any]:
    """What the file says, without its checksum; {} where there is none. One without a checksum is of an older version.

    Raises:
        StoreError: it is damaged, or cannot be read.
    """
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise ValueError("it is no file that was written here")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a JSON {type(content).__name__}")
        said = content.pop(_CHECKSUM, None)
        if said is not None and said != _sum(content):
            raise ValueError("its checksum does not fit what it says")
        if said is None and _has_a_sum_by_another_name(content):
            raise ValueError("its checksum has lost its name")
        _check(content, _KINDS, "")
        _check(content.get("inputs", {}), _INPUTS, "inputs.")
        _check(content.get("inputs", {}).get("options", {}), _OPTIONS, "inputs.options.")
        return content
    except (OSError, ValueError, RecursionError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise StoreError(f"{path} is damaged ({why}); the same run again writes it anew") from None


def _check(said: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], bool]], where: str) -> None:
    """Refuse what is not of its kind, before anybody relies on it; what is not there has its default."""
    for key, fits in kinds.items():
        if key in said and not fits(said[key]):
            raise ValueError(f"its {where}{key} is {str(said[key])[:40]!r}")


def options_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `open_source` that the inputs were opened with."""
    said = inputs.get("options", {})
    return {key: said[key] for key in _OPTIONS if key in said}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write it with its checksum.

    Raises:
        StoreError: it cannot be written.
    """
    plain = json.loads(json_text(content))
    writing.write(path, json_text({_CHECKSUM: _sum(plain), **plain}, indent=1).encode())


def is_signed(path: Path) -> bool:
    """Whether a sound file has a checksum."""
    return _CHECKSUM in json.loads(path.read_text(encoding="utf-8"))


def differences(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Which inputs differ. Other layers may lie in other files: those of before have to be as they were."""
    changed = {key for key in {*before, *wanted} - {"files"} if before.get(key) != wanted.get(key)}
    new = wanted.get("files", {})
    for path, file in _files(before):
        if not (fingerprint.same(file, new[path]) if path in new else fingerprint.is_as_it_was(path, file)):
            changed.add("files")
    return sorted(changed)


def why_refused(before: Mapping[str, Any], changed: Sequence[str], wanted: Mapping[str, Any]) -> str:
    """What a directory of other inputs holds, and what to do but choose another one."""
    moved = [key for key in changed if key != "files"]
    models = [(str(before.get(key)), str(wanted.get(key))) for key in moved]
    if not models or any(not commit_of(old) or commit_of(old) != commit_of(new) for old, new in models):
        return f"holds results of other inputs (different: {', '.join(changed)}); nothing was changed there:"
    (old, new), *_ = models
    as_then = (
        "without --download" if is_url(old) else f"with --download and HF_HUB_CACHE={old.partition('/models--')[0]}"
    )
    return (
        f"holds results of the same commits read from another place ({old}, now {new}); nothing was changed there: "
        f"run it as then ({as_then}), or"
    )


def with_files(before: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with the files of both, and of each file what either says."""
    files = dict(_files(before or {}))
    for path, file in _files(wanted):
        files[path] = {**files.get(path, {}), **file}
    return {**wanted, "files": files}


def changed_file(inputs: Mapping[str, Any]) -> str | None:
    """A file that results were computed from and that is another one now; one that is gone does not count."""
    there = ((path, file) for path, file in _files(inputs) if os.path.exists(path))
    return next((path for path, file in there if not fingerprint.is_as_it_was(path, file)), None)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _maybe_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _maybe_count(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value < 2**62)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _object_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def is_coverage(value: Any) -> bool:
    """Whether it is what a command records of coverage: a list of warnings, and name → reason of each kind."""
    if not isinstance(value, dict):
        return False
    return all(_texts(part) if key == "warnings" else _object_of(_text)(part) for key, part in value.items())


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "inputs": lambda value: isinstance(value, dict),
    "started": _text,
    "finished": _text,
    "command": _texts,
    "top": _maybe_count,
    "device": _text,
    "threads_per_matrix": _maybe_count,
    "sides": _texts,
    "versions": _object_of(_text),
    "methods": _object_of(_text),
    "tables": _object_of(_text),
    "made_from": _object_of(_text),
    "pairs": _object_of(lambda labels: _texts(labels) and len(labels) == 2),
    "coverage": is_coverage,
}
_INPUTS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("kind", "tuned", "base", "a", "b"), _maybe_text),
    "top": _maybe_count,
    "options": _object_of(_scalar),
    "files": _object_of(_object_of(_scalar)),
}
_OPTIONS: Mapping[str, Callable[[Any], bool]] = {
    "split": lambda value: isinstance(value, bool),
    "heads": lambda value: isinstance(value, str) or (type(value) is int and value >= 0),
    "scale": lambda value: value is None or (isinstance(value, int | float) and not isinstance(value, bool)),
}


def _has_a_sum_by_another_name(content: Mapping[str, Any]) -> bool:
    """Whether damage has struck the one word that says which entry is the checksum, and perhaps that entry, too."""
    unknown = [value for key, value in content.items() if key not in _KINDS]
    return any(isinstance(value, str) and len(value) == 2 * _BYTES for value in unknown)


def _sum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=_BYTES).hexdigest()


def _files(inputs: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    files: Mapping[str, Mapping[str, Any]] = inputs.get("files", {})
    return files.items()
