"""Whose eigenvalues are the faster ones on this machine: measured once for a size, and kept in the user's cache.

Two builds of LAPACK are at hand, torch's and numpy's. Which of them is faster, and by how much, depends on the
processor and the size; the eigenvalues are the same up to the last bits. What was measured holds from then on, so that
the same command gives the same bits, until the user asks to measure again. It is used where a matrix is solved on one
core, several of them side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.engine.solvers.eigenvalues import BY, Library, by_torch, is_numpy_limited
from spectra.files.snapshots import users_cache

SWITCH = "SPECTRA_CALIBRATE"  # "0" or "off": torch's, whatever was measured; "again": what was measured is replaced
_SIZES = (512, 768, 1024, 1536)  # beyond them no build won by enough
_LEAST, _MOST = 501, 1792  # up to 500 rows numpy keeps the interpreter's lock: nothing else would go on meanwhile
_ENOUGH = 8  # matrices of a size that are worth measuring for: it takes as long as solving four to six of them
_MARGIN = 0.9  # of torch's time, which numpy's has to stay under
_ROUNDS = 3
_IDENTITY = ("vendor_id", "cpu family", "model", "model name", "stepping", "cpu implementer", "cpu variant", "cpu part")
_ELSEWHERE = (
    "that is for matrices that svd, similarity, series or extract solve on this machine's CPU, on one core each and "
    "without --workers"
)

_anew: list[int] = []  # sizes, by this process
_hindrances: deque[str] = deque(maxlen=1)  # why it measured nothing when it last might have
_asked: set[Path] = set()  # what this process has measured, or tried to: once is enough


def eigenvalues(gram: Float64[Tensor, "*batch s s"]) -> Float64[Tensor, "*batch s"]:
    """Eigenvalues of a Gram matrix, descending, none negative; only its upper triangle is read.

    Example:
        >>> eigenvalues(torch.diag(torch.tensor([1.0, 4.0])).double()).tolist()
        [4.0, 1.0]
    """
    alone = gram.dim() == 2 and not gram.is_cuda and is_numpy_limited() and torch.get_num_threads() == 1
    ascending = BY[library_for(gram.shape[-1])](gram) if alone else by_torch(gram)
    return ascending.flip(-1).clamp(min=0)


def library_for(size: int) -> Library:
    """Whose eigenvalues a matrix of s rows gets on one core: what was measured, torch's where nothing was."""
    near = _class_of(size)
    return "torch" if near is None or is_off() else _kept(_file_of(near))


def concerns(sizes: Iterable[int]) -> bool:
    """Whether there is a choice for any of the sizes."""
    return not is_off() and any(_class_of(size) is not None for size in sizes)


def calibrate(sizes: Iterable[int]) -> dict[int, Library]:
    """Measure what is not known yet of the sizes that many of the matrices have; what holds for each afterwards.

    For a thread that has one core, while numpy has one, too.

    Args:
        sizes: s = min(m, n) of every matrix that is to be solved on one core.
    """
    if is_off():
        return {}
    counts = Counter(near for size in sizes if (near := _class_of(size)) is not None)
    if max(counts.values(), default=0) < _ENOUGH:
        hinder(f"no size between {_LEAST} and {_MOST} has {_ENOUGH} full matrices here")
    for near, count in counts.items():
        if count >= _ENOUGH and _is_due(_file_of(near)):
            _asked.add(_file_of(near))
            try:
                _measure_into(_file_of(near), near)
            except OSError as problem:  # nowhere to keep it: torch's holds, and nothing is measured again and again
                hinder(f"what is measured cannot be kept ({problem})")
    return {near: library_for(near) for near in sorted(counts)}


def hinder(why: str) -> None:
    """Keep why nothing is measured, for `why_unmeasured`."""
    _hindrances.append(why)


def why_unmeasured() -> str:
    """Why this process has measured nothing, for a user who asked for it; "" where it has."""
    if is_off():
        return "calibration is switched off"
    return "" if _anew else next(reversed(_hindrances), _ELSEWHERE)


def measured(size: int) -> dict[Library, float]:
    """Seconds of one core for the eigenvalues of a matrix of s rows, by each library: the best of three, in turn."""
    generator = torch.Generator().manual_seed(size)
    half = torch.randn((size, size), generator=generator, dtype=torch.float64)
    matrix = half + half.T
    best: dict[Library, float] = dict.fromkeys(BY, float("inf"))
    for library, solve in [*BY.items()] * _ROUNDS:
        start = time.thread_time()
        solve(matrix)
        best[library] = min(best[library], time.thread_time() - start)
    return best


def is_off() -> bool:
    """Whether the user has switched it off."""
    return os.environ.get(SWITCH, "").lower() in ("0", "off", "no", "false")


def _is_again() -> bool:
    return os.environ.get(SWITCH, "").lower() == "again"


def _is_due(file: Path) -> bool:
    return file not in _asked if _is_again() else not file.exists()


def _class_of(size: int) -> int | None:
    return min(_SIZES, key=lambda near: abs(np.log(near / size))) if _LEAST <= size <= _MOST else None


def _file_of(size: int) -> Path:
    return users_cache() / "spectra" / "eigenvalues" / f"{_machine()}-{size}.json"


@lru_cache(maxsize=1)
def _machine() -> str:
    """Changes with the processor and the libraries: several machines may share a home."""
    builds = f"{torch.__config__.show()}|numpy {np.__version__} {np.show_config(mode='dicts')}"
    return hashlib.sha256(f"{sorted(_processor().items())}|torch {torch.__version__} {builds}".encode()).hexdigest()[
        :16
    ]


def _processor() -> dict[str, str]:
    """What the kernel says of the first processor; clouds give several generations the same name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {"model name": platform.processor() or platform.machine()}
    fields = (line.partition(":")[::2] for line in text.partition("\n\n")[0].splitlines())
    known = {name.strip(): value.strip() for name, value in fields if name.strip().lower() in _IDENTITY}
    return known or {"model name": platform.machine()}


@lru_cache(maxsize=64)
def _kept(file: Path) -> Library:
    try:
        seconds = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return "numpy" if float(seconds["numpy"]) < _MARGIN * float(seconds["torch"]) else "torch"
    except (OSError, ValueError, KeyError, TypeError):
        return "torch"


def _measure_into(file: Path, size: int) -> None:
    """What is there first stays, for other processes may have begun by it; unless the user wants it replaced.

    Raises:
        OSError: it cannot be kept there.
    """
    if not file.is_absolute():
        raise FileNotFoundError(f"no cache folder: {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")  # other hosts may share the folder
    try:
        with partial.open("w", encoding="utf-8") as writing:
            json.dump({**_processor(), "size": size, "seconds": measured(size)}, writing)
        if _is_again() or not _linked(partial, file):
            os.replace(partial, file)
        _anew.append(size)
    finally:
        partial.unlink(missing_ok=True)
        _kept.cache_clear()


def _linked(partial: Path, file: Path) -> bool:
    """Whether the file is there now; not so on file systems without hard links."""
    try:
        os.link(partial, file)
    except OSError:
        return file.exists()
    return True
