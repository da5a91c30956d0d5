"""Changes of the disk, seen before they are made: files opened for writing, renamed, removed, folders made."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def watch(act: Callable[[], object]) -> None:
    """Call something before every change that this process makes from now on."""

    def see(event: str, given: tuple) -> None:
        if event in _CHANGES or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR)):
            act()

    sys.addaudithook(see)


def on_change(count: int, act: Callable[[], object]) -> Callable[[], None]:
    """What makes a process do something just before its count-th change of the disk."""

    def install() -> None:
        left = [count]

        def one_less() -> None:
            left[0] -= 1
            if left[0] == 0:
                act()

        watch(one_less)

    return install


def no_room() -> None:
    """What the system says of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit(size: int, *, fatal: bool = False) -> None:
    """No file of this process grows beyond a size: writing more fails, or kills it in the middle."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fatal else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
