"""Whose eigenvalues are the faster ones on this machine: measured once for a size, and kept in the user's cache.

Two builds of LAPACK are at hand, torch's and numpy's. Which of them is faster, and by how much, depends on the
processor and the size; the eigenvalues are the same up to the last bits. What was measured holds from then on, so that
the same command gives the same bits. It is used where a matrix is solved on one core, several of them side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.engine.solvers.eigenvalues import BY, Library, by_torch, is_numpy_limited

SWITCH = "SPECTRA_CALIBRATE"  # "0" or "off": torch's, whatever was measured
_SIZES = (256, 384, 512, 768, 1024, 1536)  # below and beyond them no build won by enough
_LEAST, _MOST = 192, 1792
_ENOUGH = 8  # matrices of a size that are worth measuring for: it takes as long as solving four to six of them
_MARGIN = 0.9  # of torch's time, which numpy's has to stay under
_ROUNDS = 3


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


def calibrate(sizes: Iterable[int]) -> dict[int, Library]:
    """Measure what is not known yet of the sizes that many of the matrices have; what holds for each afterwards.

    For a thread that has one core, while numpy has one, too.

    Args:
        sizes: s = min(m, n) of every matrix that is to be solved on one core.
    """
    if is_off():
        return {}
    counts = Counter(near for size in sizes if (near := _class_of(size)) is not None)
    for near, count in counts.items():
        if count >= _ENOUGH and not _file_of(near).exists():
            with suppress(OSError):  # nowhere to keep it: torch's holds, and nothing is measured again and again
                _measure_into(_file_of(near), near)
    return {near: library_for(near) for near in sorted(counts)}


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


def _class_of(size: int) -> int | None:
    return min(_SIZES, key=lambda near: abs(np.log(near / size))) if _LEAST <= size <= _MOST else None


def _file_of(size: int) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "spectra" / "eigenvalues" / f"{_machine()}-{size}.json"


@lru_cache(maxsize=1)
def _machine() -> str:
    """Changes with the processor and the libraries."""
    text = f"{_processor()}|torch {torch.__version__}|numpy {np.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@lru_cache(maxsize=64)
def _kept(file: Path) -> Library:
    try:
        seconds = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return "numpy" if float(seconds["numpy"]) < _MARGIN * float(seconds["torch"]) else "torch"
    except (OSError, ValueError, KeyError, TypeError):
        return "torch"


def _measure_into(file: Path, size: int) -> None:
    """What is there first stays: other processes may have begun by it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as writing:
            json.dump({"processor": _processor(), "size": size, "seconds": measured(size)}, writing)
        with suppress(FileExistsError):
            os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)
        _kept.cache_clear()
