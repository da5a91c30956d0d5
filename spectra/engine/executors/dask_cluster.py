"""A Dask cluster as an executor: deltas travel as recipes, spectra come back, only the driver writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from spectra.errors import MissingExtraError, SpectraError

_CONNECT = "15s"
_WAIT_FOR_WORKERS = 120
_SHARE = 0.6  # of a worker's memory limit; above it Dask starts to spill and to pause
_RETRIES = 2  # of a task whose worker was lost


class ClusterExecutor(Executor):
    """The workers of a Dask scheduler.

    Attributes:
        own_memory: True: the budget is for each worker thread, not for all matrices together.
    """

    own_memory = True

    def __init__(self, client: Any) -> None:
        self._client = client
        self._plain = client.get_executor(pure=False, retries=_RETRIES)
        self._on_gpu = client.get_executor(pure=False, retries=_RETRIES, resources={"GPU": 1})

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run fn on some worker; on one that offers a GPU, if that is where the work is for."""
        wants_gpu = str(getattr(fn, "device", "")).startswith("cuda")
        future: Future[Any] = (self._on_gpu if wants_gpu else self._plain).submit(fn, *args, **kwargs)
        return future

    @property
    def _max_workers(self) -> int:
        """Threads of all workers that are there now; they may come and go."""
        return max(1, sum(self._client.nthreads().values()))

    @property
    def memory_budget(self) -> int | None:
        """Bytes for one matrix: what the smallest worker has for each of its threads; None if it has no limit."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        limits = [worker["memory_limit"] / worker["nthreads"] for worker in workers if worker["memory_limit"]]
        return int(min(limits) * _SHARE) if limits else None


@contextmanager
def cluster_executor(address: str) -> Iterator[ClusterExecutor]:
    """Connect to a running Dask scheduler.

    Args:
        address: "tcp://host:8786" or whatever the scheduler printed.

    Raises:
        MissingExtraError: distributed is not installed.
        SpectraError: nothing answers there, or it has no workers.
    """
    try:
        from distributed import Client
    except ImportError:
        raise MissingExtraError("--cluster", "cluster") from None
    try:
        client = Client(address, timeout=_CONNECT)
    except (OSError, ValueError, TimeoutError) as problem:
        raise SpectraError(f"no Dask scheduler answers at {address} ({problem}); start one first") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=_WAIT_FOR_WORKERS)
        except TimeoutError:
            raise SpectraError(
                f"the Dask scheduler at {address} has no workers; start some: dask worker {address}"
            ) from None
        yield ClusterExecutor(client)
