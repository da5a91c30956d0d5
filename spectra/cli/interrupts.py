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
def heard() -> Iterator[None]:
    """Listen while the block runs, and from a Ctrl-C on until the process ends.

    Outside the main thread, and where somebody else handles Ctrl-C, nothing is done.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:  # another one would be a traceback out of the way to the exit; the listener ends it
            signal.default_int_handler(number, frame)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, stop)
    listener = threading.Thread(target=_listen, args=(reading,), daemon=True)
    listener.start()
    try:
        yield
    finally:
        if not came:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(before)
            os.close(writing)  # which ends the listener
            listener.join()


def _listen(pipe: int) -> None:
    """Say what is waited for after one Ctrl-C, and end the process after two."""
    count = 0
    while number := os.read(pipe, 1):
        count += number[0] == signal.SIGINT
        if count > 1:
            os._exit(STOPPED)  # what is stored is whole: each file is put in its place in one step
        if count and not select.select([pipe], [], [], _SOON)[0]:
            os.write(2, _WAITING.encode())
    os.close(pipe)
