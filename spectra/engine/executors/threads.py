"""Several matrices side by side in this process, each solved on its share of the cores.

`torch.set_num_threads` sets two things: the calling thread's own setting (OpenMP's and MKL's), and the one
that every thread takes over when it first computes, even if it called `set_num_threads` before that. So
each thread of the pool first takes over, then sets its share, all before the first matrix; and then one
more thread puts back what later threads take over. The caller's own setting is never touched, not even
while the pool is at work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from spectra.engine.devices import cores

_LARGEST_KEPT = 31 * 2**20  # bytes; glibc adapts to blocks below 32 MiB only


def keep_freed_memory() -> None:
    """Let the next matrix have the memory of the last one, instead of fresh pages from the kernel.

    glibc's malloc returns large blocks to the kernel when they are freed, up to the size of the largest such
    block that it has seen. So one is freed here; nothing is written to it. Elsewhere this does nothing.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


@contextmanager
def thread_executor(workers: int, threads: int | None = None) -> Iterator[Executor]:
    """A pool of threads that share the cores that torch may use.

    Args:
        workers: how many matrices side by side.
        threads: torch threads for each; None for an equal share of the caller's.
    """
    share = threads or max(1, cores() // workers)
    inherited: list[int] = []
    _in_new_thread(lambda: inherited.append(torch.get_num_threads()))
    with ThreadPoolExecutor(workers, thread_name_prefix="spectra") as pool:
        everyone = threading.Barrier(workers)
        started = [pool.submit(_take_share, share, everyone) for _ in range(workers)]
        for future in started:
            future.result()
        _in_new_thread(lambda: torch.set_num_threads(inherited[0]))
        yield pool


def _take_share(share: int, everyone: threading.Barrier) -> None:
    torch.get_num_threads()  # takes over; else the first computation would, and undo the next line
    torch.set_num_threads(share)
    everyone.wait()  # else one thread could take two of these tasks and leave another unset


def _in_new_thread(task: Callable[[], None]) -> None:
    thread = threading.Thread(target=task)
    thread.start()
    thread.join()
