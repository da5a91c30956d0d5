"""Eigenvalues of a Gram matrix, by torch's LAPACK or by numpy's: two builds of the same algorithm, of unequal speed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

Library = Literal["torch", "numpy"]


def by_torch(gram: Float64[Tensor, "*batch s s"]) -> Float64[Tensor, "*batch s"]:
    """Ascending, of one matrix or a batch, on its device; only the upper triangle is read.

    The transpose is already in LAPACK's order, which saves a strided copy.

    Example:
        >>> by_torch(torch.tensor([[1.0, 2.0], [-9.0, 1.0]]).double()).tolist()
        [-1.0, 3.0]
    """
    return torch.linalg.eigvalsh(gram.mT, UPLO="L")


def by_numpy(gram: Float64[Tensor, "s s"]) -> Float64[Tensor, " s"]:
    """The same of one matrix on the CPU; from 501 rows on, other threads of this process go on meanwhile.

    Numpy gives the interpreter's lock away where a call has more than 500 things to do, and counts rows here.

    Raises:
        RuntimeError: the iteration did not converge, which torch tells by the same class.

    Example:
        >>> by_numpy(torch.tensor([[1.0, 2.0], [-9.0, 1.0]]).double()).tolist()
        [-1.0, 3.0]
    """
    try:
        return torch.from_numpy(np.linalg.eigvalsh(gram.numpy().T, UPLO="L"))
    except np.linalg.LinAlgError as problem:
        raise RuntimeError(f"numpy's eigvalsh: {problem}") from None


BY: Mapping[Library, Callable[[Tensor], Tensor]] = {"torch": by_torch, "numpy": by_numpy}


class _Limit:
    """Numpy's LAPACK held at one core, from the first who needs it to the last.

    Set and put back by a thread of its own: `threadpoolctl` obeys one thread at a time, runs may overlap, and whoever
    ends last need not be who began.
    """

    def __init__(self) -> None:
        self.works = False  # whether other threads see it
        self._users = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """One more who needs it."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                is_set, self._over = threading.Event(), threading.Event()
                self._keeper = threading.Thread(target=_keep, args=(is_set, self._over), daemon=True)
                self._keeper.start()
                is_set.wait()
                self.works = _is_on_one_core()

    def leave(self) -> None:
        """One less; the last puts it back."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self.works = False
                self._over.set()
                self._keeper.join()


def _keep(is_set: threading.Event, over: threading.Event) -> None:
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            is_set.set()
            over.wait()
    finally:
        is_set.set()


_LIMIT = _Limit()


def _is_on_one_core() -> bool:
    """Whether this thread, which did not set the limit, sees numpy's own library on one core.

    Not so where the limit is the setting thread's alone (MKL, OpenBLAS on OpenMP), where another thread of the process
    is the one that is obeyed, and where numpy has a library that takes no limit (Accelerate).
    """
    built: Any = np.show_config(mode="dicts")
    name = str(built.get("Build Dependencies", {}).get("lapack", {}).get("name")).lower()
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return any(pool["internal_api"] in name for pool in pools) and all(pool["num_threads"] == 1 for pool in pools)


@contextmanager
def numpy_on_one_core() -> Iterator[None]:
    """Numpy's LAPACK takes one core inside, for each of the threads that use it at once; as it was afterwards.

    The limit is the process's. `is_numpy_limited` says whether it could be had. Torch's threads are not touched, its
    libraries being linked into it.
    """
    _LIMIT.enter()
    try:
        yield
    finally:
        _LIMIT.leave()


def is_numpy_limited() -> bool:
    """Whether numpy is on one core in this process now, whichever thread asks."""
    return _LIMIT.works
