"""Figures drawn by a process of their own, which loads what it needs for that while this one computes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spectra.errors import SpectraError

USUAL = ("histogram", "depth")  # as in spectra.plots, which is not imported to print a help; a test holds them together
# Run with this process's own path, so that both read the same package, and nothing else of the folder they stand in.
_BEGIN = "import sys; sys.path[:] = sys.argv[1:]; from spectra.cli.drawing import serve; serve()"


class DrawingProcess:
    """Another interpreter that loads matplotlib now, and draws when it is told what.

    It costs a second of a core and 100 MiB while the engine works, and figures are drawn side by side in it. When this
    process ends, however it does, its input ends and it goes, too.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # no room for it: whoever draws does so here
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN, *(place or os.getcwd() for place in sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )

    def draw(self, directory: str, calls: Sequence[Mapping[str, Any]]) -> tuple[list[Path], list[str]] | None:
        """The files and notes of `draw_results` with these options, call by call; None where the process is no more.

        Raises:
            SpectraError: as `draw_results`.
        """
        if self._process is None:
            return None
        try:
            told, _ = self._process.communicate(pickle.dumps((os.getcwd(), directory, calls)))
            answers: list[Any] = pickle.loads(told)
        except (OSError, ValueError, EOFError, pickle.UnpicklingError):
            return None
        files: dict[Path, None] = {}
        notes: dict[str, None] = {}
        for answer in answers:
            if isinstance(answer, SpectraError):
                raise answer
            files |= dict.fromkeys(answer[0])
            notes |= dict.fromkeys(answer[1])
        return list(files), list(notes)

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def drawing_process(wanted: bool) -> Iterator[DrawingProcess | None]:
    """One for as long as the block runs, or none."""
    process = DrawingProcess() if wanted else None
    try:
        yield process
    finally:
        if process is not None:
            process.close()


def serve() -> None:
    """What the other process does: load, wait, draw, answer. It ends without a word where nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever began this hears Ctrl-C
    answer = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    with suppress(Exception):  # then whoever asks draws for himself, and tells what is wrong
        import matplotlib.backends.backend_agg
        import matplotlib.backends.backend_pdf  # noqa: F401

        import spectra.plots.stored  # noqa: F401

        asked = sys.stdin.buffer.read()
        if asked:
            folder, directory, calls = pickle.loads(asked)
            os.chdir(folder)
            with os.fdopen(answer, "wb") as stream:
                stream.write(pickle.dumps(_side_by_side(directory, calls)))


def _side_by_side(directory: str, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What each call gives: the first here, the others in copies of this process, where the system makes such."""
    from multiprocessing import get_all_start_methods, get_context

    if "fork" not in get_all_start_methods():
        return [_drawn(directory, options) for options in calls]
    context = get_context("fork")
    ends = []
    for options in calls[1:]:
        here, there = context.Pipe(duplex=False)
        context.Process(target=lambda end, how: end.send(_drawn(directory, how)), args=(there, options)).start()
        there.close()
        ends.append(here)
    return [_drawn(directory, options) for options in calls[:1]] + [end.recv() for end in ends]


def _drawn(directory: str, options: Mapping[str, Any]) -> Any:
    from spectra.plots.stored import draw_results

    try:
        drawn = draw_results(directory, **options)
    except SpectraError as problem:
        return problem
    return drawn.files, drawn.notes
