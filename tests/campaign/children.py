"""Work in a forked process: it may be killed, hang, crash or take too much memory, and the campaign goes on."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_RAISED = 91  # the exit status of work that an exception left
Work = Callable[[], "int | None"]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status; minus the signal's number if one ended it.
        out: what it wrote to stdout.
        err: what it wrote to stderr.
        seconds: how long it took.
        peak: the most bytes it, or a child of it, held at once beyond what it was born with.
        late: whether its time was up; its stacks are at the end of `err` then.
    """

    status: int
    out: str
    err: str
    seconds: float
    peak: int
    late: bool = False

    @property
    def raised(self) -> bool:
        """Whether an exception left the work."""
        return self.status == _RAISED

    @property
    def killed(self) -> bool:
        """Whether a kill that was meant for it ended it: SIGKILL, or a file that grew beyond its limit."""
        return self.status in (-signal.SIGKILL, -signal.SIGXFSZ) and not self.late


@dataclass
class Child:
    """A process at work.

    Attributes:
        pid: its number.
        home: the folder that it works in; its output lies beside it.
        begun: when it was born.
        seconds: how long it may take.
        inherited: bytes of memory that it was born with.
        leads: whether it leads a group of processes, which ends with it.
    """

    pid: int
    home: Path
    begun: float
    seconds: float
    inherited: int
    leads: bool = False

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it, or all of its group, a signal."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if self.leads else os.kill)(self.pid, number)

    def wait(self) -> Ended:
        """Until it has ended, by itself or because its time is up."""
        late = not self.ends_within(self.begun + self.seconds - time.monotonic())
        if late:
            self.kill(signal.SIGUSR1)  # prints its stacks
            self.ends_within(1.0)
        if late or self.leads:
            self.kill()
        _, status, used = os.wait4(self.pid, 0)
        texts = []
        for stream in ("out", "err"):
            path = _output(self.home, self.pid, stream)
            texts.append(path.read_text(errors="backslashreplace") if path.exists() else "")
            path.unlink(missing_ok=True)
        peak = max(0, used.ru_maxrss * 1024 - self.inherited)
        return Ended(os.waitstatus_to_exitcode(status), *texts, time.monotonic() - self.begun, peak, late)

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends in this time."""
        descriptor = os.pidfd_open(self.pid)
        try:
            return bool(select.select([descriptor], [], [], max(0.0, seconds))[0])
        finally:
            os.close(descriptor)


def start(work: Work, home: Path, *, seconds: float = 120, memory: int | None = None, leads: bool = False) -> Child:
    """Fork a process that works in a folder.

    Args:
        work: what it does; what it returns is its exit status.
        home: its working folder.
        seconds: how long it may take.
        memory: bytes of address space beyond what it is born with; more raises MemoryError in it.
        leads: whether it leads a group of processes.
    """
    if threading.active_count() > 1:
        raise RuntimeError(f"a process with threads is not forked: {threading.enumerate()}")
    sys.stdout.flush()
    sys.stderr.flush()
    inherited, begun = _anonymous(), time.monotonic()
    pid = os.fork()
    if pid == 0:
        _live(work, home, memory, leads)
    if leads:
        with contextlib.suppress(OSError):  # it may have done so itself, or be gone
            os.setpgid(pid, pid)
    return Child(pid, home, begun, seconds, inherited, leads)


def call(work: Work, home: Path, *, seconds: float = 120, memory: int | None = None, leads: bool = False) -> Ended:
    """Start a process and wait for it; it ends with the wait."""
    child = start(work, home, seconds=seconds, memory=memory, leads=leads)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.kill()
        child.wait()
        raise


def _live(work: Work, home: Path, memory: int | None, leads: bool) -> NoReturn:
    """The child's whole life."""
    status = _RAISED
    try:
        if leads:
            os.setpgid(0, 0)
        for stream, number in (("out", 1), ("err", 2)):
            file = os.open(_output(home, os.getpid(), stream), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        os.chdir(home)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.enable(2)
        faulthandler.register(signal.SIGUSR1, 2, all_threads=True)
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (_mapped() + memory, resource.RLIM_INFINITY))
        status = work() or 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(bool(left.code))
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _output(home: Path, pid: int, stream: str) -> Path:
    return home.with_name(f".{home.name}.{pid}.{stream}")


def _anonymous() -> int:
    """Bytes in memory that belong to no file: what a forked process holds from its first moment on."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
