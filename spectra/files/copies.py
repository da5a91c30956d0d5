"""Models below URLs, copied whole onto this machine: into a folder of the version that they have now.

The hub's models have the hub's own cache. A copy that was broken off goes on where it stopped: its folder is named
after the versions of all its files, so a part is a part of the same file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from spectra.errors import NotFoundError, SourceError
from spectra.files.choice import PIPELINE, WEIGHT_SUFFIXES, choose, read_json
from spectra.files.far import Far, copied
from spectra.files.remote import Web
from spectra.files.snapshots import spectras_cache
from spectra.files.storage import Place

_CHUNK = 64 * 2**20  # bytes in memory at a time: eight requests side by side
_BESIDE = (".json", ".yaml", ".distcp", ".metadata")

Progress = Callable[[int, int], None]  # bytes that came, bytes of all files


def copy(place: Place, progress: Progress | None = None, only: Collection[str] | None = None) -> Path:
    """The folder, or file, on this machine that holds what the place holds now.

    Args:
        place: a folder or file below a URL.
        progress: is told how far it is.
        only: the addresses of the weight files that are wanted; None for all.

    Raises:
        NotFoundError: there are no weights.
        SourceError: it cannot be read, or written here.
    """
    alone = place.is_file()
    home = place.parent if alone else place
    files = [place, *_configs(home)] if alone else list(_files(place))
    said = sorted((file.path, file.stamp()) for file in files)
    name = f"{home.name or 'model'}-{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}"
    wanted = [file for file in files if only is None or file.path in only or file.suffix in _BESIDE]
    folder, total, before = spectras_cache() / "models" / name, sum(file.stamp()[0] for file in wanted), 0
    for file in wanted:
        target = folder / file.path.removeprefix(home.path).strip("/")
        for count in _copied(file, target):
            if progress:
                progress(before + count, total)
        copied[file.path] = str(target), file.stamp()
        before += file.stamp()[0]
    return folder / place.name if alone else folder


def _configs(home: Place) -> list[Place]:
    found = (home / name for name in ("config.json", "adapter_config.json"))
    return [file for file in found if file.is_file()]


def _files(folder: Place) -> Iterator[Place]:
    """The weights in a folder, of one kind, and what lies beside them; of a pipeline, those of its components."""
    if (folder / PIPELINE).is_file():
        yield folder / PIPELINE
        for name, entry in read_json(folder / PIPELINE).items():
            try:
                if isinstance(entry, list) and not {"/", "\\", "."} & {*name}:
                    yield from _files(folder / name)
            except NotFoundError:
                continue  # tokenizers and schedulers have no weights
        return
    there = folder.items()
    beside = [file for file in there if file.suffix in _BESIDE and file.is_file()]
    weights = choose(folder).files if isinstance(folder.storage, Web) else _weights(there)
    if not weights and not any(file.suffix == ".distcp" for file in beside):
        raise NotFoundError(f"{folder} holds no weights ({', '.join(WEIGHT_SUFFIXES)})")
    yield from {file.path: file for file in (*beside, *weights)}.values()


def _weights(there: list[Place]) -> list[Place]:
    found = [file for file in there if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
    return [file for file in found if file.suffix == ".safetensors"] or found


def _copied(file: Place, target: Path) -> Iterator[int]:
    """Copy a file, and say how many bytes of it are there, again and again."""
    stamp = file.stamp()
    size, part = stamp[0], target.with_name(f"{target.name}.part")
    if target.is_file() and target.stat().st_size == size:
        yield size
        return
    if not isinstance(file.storage, Far):
        raise SourceError(f"{file} is on this machine already")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        with open(part, "r+b") as out:  # at their places: of two runs at once, both write the same bytes there
            out.seek(0, os.SEEK_END)
            while (start := out.tell()) < size:
                content = memoryview(bytearray(min(_CHUNK, size - start)))
                out.write(content[: file.storage.fetch(file.path, stamp, start, content)])
                out.flush()
                yield out.tell()
        with suppress(FileNotFoundError):  # another run has done it
            part.replace(target)
    except OSError as problem:
        raise SourceError(f"{file} cannot be copied to {target}: {problem.strerror or problem}") from None
