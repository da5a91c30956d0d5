"""What must hold, whatever happened: one message, equal folders, no wrong array."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

import spectra
from campaign.case import HarmError
from campaign.children import Ended
from spectra.errors import StoreError

_RUN_ONLY = ("started", "finished", "checksum")  # of run.json: when it was, and so its checksum
_TRACES = re.compile(r"^Traceback \(most recent|^Fatal Python error|^Exception ignored|^Exception in thread", re.M)


def one_message(ended: Ended, what: str = "the command") -> None:
    """It ended by itself: with 0, or with one line that begins with Error and says something."""
    if ended.late:
        raise HarmError(f"{what} was not done after {ended.seconds:.0f} s:\n{ended.err}")
    if ended.status < 0 or ended.raised or _TRACES.search(ended.err):
        raise HarmError(f"{what} ended with {ended.status}:\n{ended.err}")
    errors = [line for line in ended.err.splitlines() if line.startswith(("Error", "spectra: error"))]
    if len(errors) > 1 or (ended.status == 2) or any(len(line) < 20 for line in errors):
        raise HarmError(f"{what} ended with {ended.status} and not with one message:\n{ended.err}")
    if ended.status and not errors and not (ended.err + ended.out).strip():
        raise HarmError(f"{what} ended with {ended.status} and no word")


def done(ended: Ended, what: str = "the command") -> None:
    """It did all it was asked for."""
    one_message(ended, what)
    if ended.status:
        raise HarmError(f"{what} ended with {ended.status}:\n{ended.err}")


def same_folders(found: Path, right: Path) -> None:
    """The same files with the same bytes; of run.json, the same words but for the times."""
    here, there = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (found, right)
    )
    if here != there:
        raise HarmError(f"too many files: {sorted(here - there)}; missing: {sorted(there - here)}")
    for name in sorted(here):
        a, b = (folder / name for folder in (found, right))
        same = _run(a) == _run(b) if a.name == "run.json" else a.read_bytes() == b.read_bytes()
        if not same:
            raise HarmError(f"{name} is not as in an undisturbed run")


def _run(path: Path) -> dict[str, Any]:
    said = json.loads(path.read_text())
    return {key: value for key, value in said.items() if key not in _RUN_ONLY}


def never_wrong(found: Path, right: Path) -> int:
    """Everything that loads is what an undisturbed run stored; how many matrices do not load.

    Both are directories that `spectra.load` reads.
    """
    expected = {item.name: item for item in spectra.load(right)}
    missing = 0
    try:
        there = spectra.load(found)
        names = there.names
    except StoreError as problem:
        _says_something(problem)
        return len(expected)
    for name, wanted in expected.items():
        if name not in names:
            missing += 1
            continue
        try:
            same_spectrum(there[name], wanted)
        except StoreError as problem:
            _says_something(problem)
            missing += 1
    return missing


def same_spectrum(found: spectra.Spectrum, wanted: spectra.Spectrum) -> None:
    """Equal arrays, bit by bit, and equal words."""
    for key in ("S", "U", "Vh"):
        a, b = getattr(found, key), getattr(wanted, key)
        if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b, equal_nan=True)):
            raise HarmError(f"a wrong {key} of {wanted.name} was loaded")
    for key in ("status", "norm", "method", "reason", "base_norm", "noise_edge", "max_rank"):
        if getattr(found, key) != getattr(wanted, key):
            raise HarmError(f"a wrong {key} of {wanted.name} was loaded: {getattr(found, key)!r}")


def _says_something(problem: Exception) -> None:
    text = str(problem)
    if not text.strip() or "\n" in text:
        raise HarmError(f"not one message: {text!r}")
