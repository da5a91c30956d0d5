"""Ctrl-C: once, the matrices in hand are waited for, and that is said; twice, the process ends at once.

Python hands a signal to the main thread when that is back from the library that it is in, which may take minutes, and a
second one on the way out would tear the library down under its own threads (SIGABRT). So a thread of ours listens, too.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 130  # what a shell reports of a command that Ctrl-C ended
_SOON = 0.7  # seconds after which it is said what is waited for
_WAITING = "waiting for the matrices in hand; Ctrl-C again ends it at once\n"


@contextmanager
def nothing_begun() -> Iterator[None]:
    """Ctrl-C ends the process at once, for there is nothing to wait for: modules are loaded, or words parsed.

    In the middle of an import a KeyboardInterrupt is a traceback, or gets lost in a callback of the import system.
    Outside the main thread, and where somebody else handles Ctrl-C, nothing is done.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before not in (signal.default_int_handler, *_OURS):
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _leave:  # not where a Ctrl-C came: that is heard until the process ends
            signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(STOPPED)


_OURS: list[object] = [_leave]  # and what listens while a command runs


@contextmanager
def heard() -> Iterator[None]:
    """Listen while the block runs, and from a Ctrl-C on until the process ends.

    Outside the main thread, and where somebody else handles Ctrl-C, nothing is done.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before not in (signal.default_int_handler, _leave):
        yield
        return
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:  # another one would be a traceback out of the way to the exit; the listener ends it
            signal.default_int_handler(number, frame)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, stop)
    _OURS.append(stop)
    listener = threading.Thread(target=_listen, args=(reading,), daemon=True)
    listener.start()
    try:
        yield
    finally:
        if not came:
            signal.signal(signal.SIGINT, before)
            _OURS.remove(stop)
            signal.set_wakeup_fd(woken)
            os.close(writing)  # which ends the listener
            listener.join()


def _listen(pipe: int) -> None:
    """Say what is waited for after one Ctrl-C, and end the process after two."""
    count = 0
    while number := os.read(pipe, 1):
        count += number[0] == signal.SIGINT
        if count > 1:
            os._exit(STOPPED)  # what is stored is whole: each file is put in its place in one step
        if count and not select.select([pipe], [], [], _SOON)[0] and signal.getsignal(signal.SIGINT) is not _leave:
            os.write(2, _WAITING.encode())
    os.close(pipe)
