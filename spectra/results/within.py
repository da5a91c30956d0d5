"""Folders of results inside another folder, as a run of many commands leaves them."""

from __future__ import annotations

import os
from pathlib import Path

# What one of them holds: the file of every run, or a table that a command keeps alone.
KEPT = ("run.json", "series.csv", "alignment.json", "intruders.json", "verify.json", "interference.json", "heads.json")
_DEEPEST = 3  # levels, and how many folders are looked at: to say where results are must not take long
_MOST = 2000


def folders_with_results(directory: Path) -> list[str]:
    """The paths, from here, of the folders inside a directory that hold results; none inside another one.

    Hidden folders are passed over, and where the directory holds results itself, there are none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     for name in ("spectra/lora/pairs/a", "spectra/full", "texts"):
        ...         Path(place, name).mkdir(parents=True)
        ...     for name in ("spectra/lora", "spectra/lora/pairs/a", "spectra/full"):
        ...         _ = Path(place, name, "run.json").write_text("{}")
        ...     folders_with_results(Path(place))
        ['spectra/full', 'spectra/lora']
    """
    found: list[str] = []
    for looked, (folder, inside, files) in enumerate(os.walk(directory), 1):
        here = Path(folder).relative_to(directory)
        if not set(KEPT).isdisjoint(files):
            found += [here.as_posix()] if here.parts else []
            inside.clear()
        if len(here.parts) == _DEEPEST or looked == _MOST:
            inside.clear()
        if looked == _MOST:
            break
        inside[:] = sorted(name for name in inside if not name.startswith("."))
    return sorted(found)
