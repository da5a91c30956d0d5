"""How files get onto a disk: whole or not at all; what killed processes left is removed."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from spectra.errors import StoreError

ANOTHER_PLACE = "another directory (out=, --out)"
HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]
_ABANDONED = 3600  # seconds after which a partial file of another machine is nobody's
_PARTIAL = re.compile(r"\..*\.([A-Za-z0-9]*)-(\d+)\.partial", re.DOTALL)
_CURES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.ENAMETOOLONG: "shorten the path",
}
Version = tuple[int, int, int]  # a file's number, size and time: another one after each writing


def damaged(path: Path, why: str) -> StoreError:
    """What to say of a file that is not what was stored."""
    return StoreError(
        f"{path} is missing or damaged ({why}); the same run again computes it anew, and nothing else has to be"
    )


def write(path: Path, content: bytes | Iterable[bytes], *, lasting: bool = True) -> Version:
    """Put a file in its place in one step.

    Args:
        path: its place; folders above it are made.
        content: what it holds, or pieces of it in turn.
        lasting: wait until it is on the disk.

    Raises:
        StoreError: it cannot be written; what was there before is as it was.
    """
    partial = f"{path.parent}/.{path.name[-100:]}.{HOST}-{os.getpid()}.partial"
    _sweep_once(path.parent)
    try:
        with _opened(partial) as file:
            try:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                if lasting:
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(partial)
                raise
            return version_of(os.fstat(file.fileno()))
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise not_written(path, problem) from None


def not_written(path: Path, problem: OSError | ValueError) -> StoreError:
    """What to do where the disk refuses."""
    cure = _CURES.get(getattr(problem, "errno", None) or 0, "let this user write there")
    why = problem.strerror if isinstance(problem, OSError) else str(problem)
    return StoreError(
        f"{path} cannot be written ({why}); what was stored before is unharmed: "
        f"{cure} or choose {ANOTHER_PLACE}, "
        "and run the same again to go on"
    )


def _opened(partial: str) -> BinaryIO:
    """A new file, in a folder that is made if it is not there."""
    try:
        return open(partial, "wb")
    except FileNotFoundError:
        os.makedirs(os.path.dirname(partial), exist_ok=True)
        return open(partial, "wb")


def version_of(status: os.stat_result) -> Version:
    """Which writing of a file this is."""
    return (status.st_ino, status.st_size, status.st_mtime_ns)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold a directory against other processes while what is in it is looked at and claimed; made where it is not.

    Where the system has no such lock, or the file system none, nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = None
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def sweep(directory: Path) -> None:
    """Remove the partial files that killed processes left: of this machine at once, of others when they are old."""
    for folder in (directory, directory / "spectra", directory / "similarity"):
        _sweep(folder)


@cache
def _sweep_once(folder: Path) -> None:
    """The same of any folder that this process writes into: figures, pages and tables leave partial files, too."""
    _sweep(folder)


def _sweep(folder: Path) -> None:
    with suppress(OSError):
        for file in [folder / name for name in os.listdir(folder) if name.endswith(".partial")]:
            if _is_abandoned(file):
                file.unlink(missing_ok=True)


def _is_abandoned(partial: Path) -> bool:
    match = _PARTIAL.fullmatch(partial.name)
    return match is not None and is_left(partial, match[1], int(match[2]))  # else another program's


def is_left(file: Path, host: str, process: int) -> bool:
    """Whether nobody is at work any more on a file that a process of a machine began."""
    if host == HOST:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False  # another user's
        return False
    return time.time() - file.stat().st_mtime > _ABANDONED
