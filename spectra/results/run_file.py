"""`run.json`: what was run on what, with a checksum over all that it says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spectra.errors import StoreError
from spectra.results import fingerprint, shelf
from spectra.results.shelf import json_text

_CHECKSUM = "checksum"
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
        if not isinstance(content.get("inputs", {}), dict):
            raise ValueError("its inputs are no object")
        files = content.get("inputs", {}).get("files", {})
        if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
            raise ValueError("its files are no object of objects")
        return content
    except (OSError, ValueError, RecursionError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise StoreError(f"{path} is damaged ({why}); the same run again writes it anew") from None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write it with its checksum.

    Raises:
        StoreError: it cannot be written.
    """
    plain = json.loads(json_text(content))
    shelf.write(path, json_text({_CHECKSUM: _sum(plain), **plain}, indent=1).encode())


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


def with_files(before: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with the files of both, and of each file what either says."""
    files = dict(_files(before or {}))
    for path, file in _files(wanted):
        files[path] = {**files.get(path, {}), **file}
    return {**wanted, "files": files}


def changed_file(inputs: Mapping[str, Any]) -> str | None:
    """A file that results were computed from and that is another one now; one that is gone does not count."""
    return next(
        (path for path, file in _files(inputs) if os.path.exists(path) and not fingerprint.is_as_it_was(path, file)),
        None,
    )


def _sum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _files(inputs: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    files: Mapping[str, Mapping[str, Any]] = inputs.get("files", {})
    return files.items()
