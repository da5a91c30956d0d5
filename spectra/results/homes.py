"""Where results may be: a directory that was given, what it holds instead, and folders of results inside it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from spectra.errors import StoreError
from spectra.files.choice import WEIGHT_SUFFIXES
from spectra.files.remote import is_url
from spectra.results.writing import ANOTHER_PLACE

# What one of them holds: the file of every run, or a table that a command keeps alone.
KEPT = ("run.json", "series.csv", "alignment.json", "intruders.json", "verify.json", "interference.json", "heads.json")
_DEEPEST = 3  # levels, and how many folders are looked at: to say where results are must not take long
_MOST = 2000
_LISTED = 6  # folders that a message names
_CONFIGS = ("config.json", "adapter_config.json", "model_index.json")


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


def home_of(directory: str | Path) -> Path:
    """A directory's path, with the user's home in it.

    Raises:
        StoreError: there is no such user, or no path can be like that.
    """
    try:
        place = Path(directory).expanduser()
        os.stat(place)
    except (RuntimeError, ValueError) as problem:
        raise StoreError(f"{directory} cannot be a directory: {str(problem).rstrip('.')}") from None
    except OSError as problem:
        if problem.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
            raise StoreError(f"{directory} cannot be looked at: {problem.strerror}") from None
    return place


def nothing_stored(directory: str | Path) -> StoreError:
    """What to do where a directory holds no results; never to write into a folder that holds something else."""
    place = home_of(directory)
    model = model_in(place)
    if is_url(str(directory)) or _may_be_of_the_hub(str(directory)):
        what = "is an address" if is_url(str(directory)) else "does not exist on this disk"
        return StoreError(
            f"{directory} {what}, and results are read from a folder: if it is a model, make its results first, "
            f"with decompose(…, out='results') or spectra svd {directory} … --out results, and give that folder"
        )
    if inside := folders_with_results(place):
        rest = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
        return StoreError(
            f"{directory} itself holds no results, but folders in it do: {', '.join(inside[:_LISTED])}{rest}; "
            f"give one of them, such as {Path(directory, inside[0])}"
        )
    if not place.exists():
        said, out = f"{directory} does not exist", Path(directory)
    elif model:
        said, out = f"{directory} holds a model ({model}) and no results", Path("results", place.resolve().name)
    else:
        said, out = f"{directory} holds no results", Path(directory)
    return StoreError(f"{said}; make them with decompose(…, out={str(out)!r}) or spectra svd … --out {out}")


def _may_be_of_the_hub(name: str) -> bool:
    """Whether a name that leads nowhere may be meant as a hub id: its first part is no folder here.

    >>> _may_be_of_the_hub("no-such-org/name"), _may_be_of_the_hub("no/such/folder"), _may_be_of_the_hub("/no/such")
    (True, False, False)
    """
    found = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*(@[\w./-]+)?", name)
    return found is not None and not Path(found[1]).exists()


def model_in(directory: Path) -> str:
    """A file that says that a folder is a model's, or that this is a file of weights itself; "" if there is none."""
    if directory.is_file():
        return directory.name
    try:
        names = sorted(os.listdir(directory)) if directory.is_dir() else []
    except OSError as problem:
        raise StoreError(f"{directory} cannot be listed: {problem.strerror}; choose {ANOTHER_PLACE}") from None
    return next((name for name in names if name in _CONFIGS or name.endswith(WEIGHT_SUFFIXES)), "")
