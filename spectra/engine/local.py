"""Several matrices side by side in this process, each solved on its share of the cores."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def thread_executor(workers: int) -> Iterator[Executor]:
    """A pool of threads that share the cores that torch may use; torch's setting is restored at the end."""
    before = torch.get_num_threads()
    share = max(1, before // workers)
    torch.set_num_threads(share)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
