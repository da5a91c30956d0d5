"""A Dask cluster as an executor: deltas travel as recipes, spectra come back, only the driver writes."""

from __future__ import annotations

import logging
import pkgutil
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from typing import Any

from spectra._version import __version__
from spectra.deltas.delta import WeightDelta
from spectra.engine.executors.trust import Signed, Trust
from spectra.engine.memory import readable_size
from spectra.errors import MissingExtraError, SpectraError
from spectra.spectrum import Spectrum

_CONNECT = "15s"
_ANSWER = "30s"  # for a question to a scheduler that is there
_IMPORTS = 60.0  # for a worker to import what it needs
_NEEDED = ("spectra._version:__version__", "spectra.engine.executors.trust:Signed")
_WAIT_FOR_WORKERS = 120.0
_LOOK_AGAIN = 2.0  # seconds for which it is believed what workers there are
_SHARE = 0.6  # of a worker's memory limit; above it Dask starts to spill and to pause
_RETRIES = 2  # of a task whose worker was lost
_ADDRESS = re.compile(r"([a-z]+://)?[^\s/]+:[0-9]{1,5}/?")
_NOT_OURS = (ImportError, AttributeError, TypeError, EOFError)  # of a worker that does not know what it was sent
_CERTIFICATES = (
    "a tls:// address needs certificates: DASK_DISTRIBUTED__COMM__TLS__CA_FILE, "
    "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY say where they are"
)


class ClusterExecutor(Executor):
    """The workers of a Dask scheduler.

    Attributes:
        own_memory: True: the budget is for each worker thread, not for all matrices together.
        patience: seconds without a result after which `watch` is asked whether there can be one.
    """

    own_memory = True
    patience = 5.0

    def __init__(self, client: Any, address: str = "") -> None:
        self._client = client
        self._address = address
        self._plain = client.get_executor(pure=False, retries=_RETRIES)
        self._on_gpu = client.get_executor(pure=False, retries=_RETRIES, resources={"GPU": 1})
        self._trust = Trust()
        self._asked: set[str] = set()
        self._seen: tuple[float, Mapping[str, Any]] = (-_LOOK_AGAIN, {})
        self._idle_since: float | None = None
        self._needs_gpu = False

    def signed(self, work: Callable[[WeightDelta], Spectrum]) -> Signed:
        """The work as it travels, so that `accept` knows who did it."""
        return Signed(work)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run fn on some worker; on one that offers a GPU, if that is where the work is for.

        Raises:
            SpectraError: the scheduler is gone.
        """
        self._needs_gpu = str(getattr(fn, "device", "")).startswith("cuda")
        executor = self._on_gpu if self._needs_gpu else self._plain
        try:
            future: Future[Any] = executor.submit(fn, *args, **kwargs)
        except (OSError, RuntimeError) as problem:
            raise self._gone(problem) from None
        return future

    def accept(self, delta: WeightDelta, answer: Any) -> Spectrum:
        """A worker's result, once it is looked at.

        Raises:
            SpectraError: it is not to be believed.
        """
        self._idle_since = None
        return self._trust.accept(delta, answer)

    def refuse(self, problem: BaseException) -> None:
        """Raise where a task's failure is one of the whole cluster's, with what to do.

        Raises:
            SpectraError: a worker does not know the work, or the scheduler is gone.
        """
        if isinstance(problem, _NOT_OURS):
            raise _unfit(f"one cannot do the work ({type(problem).__name__}: {problem})") from None
        self.watch()

    def watch(self) -> None:
        """Raise where no result can come any more.

        Raises:
            SpectraError: the scheduler is gone, or for two minutes there was no worker that takes the work.
        """
        workers = self._workers(anew=True)
        why = self._why_none(workers)
        if not why:
            self._idle_since = None
            return
        self._idle_since = self._idle_since or time.monotonic()
        if time.monotonic() - self._idle_since >= _WAIT_FOR_WORKERS:
            raise SpectraError(f"no worker of the Dask scheduler at {self._address} takes the work: {why}")

    def _why_none(self, workers: Mapping[str, Any]) -> str:
        """Why none of the workers would take what is handed in; "" where one would."""
        if not workers:
            return f"there is none any more; start some: dask worker {self._address}"
        if self._needs_gpu:
            workers = {name: worker for name, worker in workers.items() if worker.get("resources", {}).get("GPU")}
            if not workers:
                return 'none offers a GPU; start them with --resources "GPU=1", or leave --device away'
        if all(worker.get("status") == "paused" for worker in workers.values()):
            limit = min(worker["memory_limit"] for worker in workers.values())
            return f"all are paused for want of memory ({readable_size(limit)} the least); start them with more of it"
        return ""

    def _workers(self, *, anew: bool = False) -> Mapping[str, Any]:
        """What the scheduler says of its workers, or said a moment ago.

        Raises:
            SpectraError: it does not answer.
        """
        when, workers = self._seen
        if anew or time.monotonic() - when >= _LOOK_AGAIN:
            try:
                said = self._client.sync(self._client.scheduler.identity, n_workers=-1, callback_timeout=_ANSWER)
            except (OSError, RuntimeError, ValueError) as problem:
                raise self._gone(problem) from None
            workers = said["workers"]
            self._ask(set(workers) - self._asked)
            self._seen = (time.monotonic(), workers)
        return workers

    def _ask(self, workers: set[str]) -> None:
        """Ask new workers for their version: one that cannot unpack what it is sent would die of it, silently.

        Raises:
            SpectraError: one of them has another version, or cannot import what is needed.
        """
        self._asked |= workers
        for name in _NEEDED if workers else ():
            for worker, said in self._run_on(workers, pkgutil.resolve_name, name).items():
                if isinstance(said, _NOT_OURS):
                    raise _unfit(f"{worker} cannot import it ({said})")
                if isinstance(said, str) and said != __version__:
                    raise _unfit(f"{worker} has {said}")

    def _run_on(self, workers: set[str], function: Callable[..., Any], *given: Any) -> dict[str, Any]:
        """What a function of Python's own gives on workers, or raises there; nothing of those that do not answer."""
        found: dict[str, Any] = {}

        def ask() -> None:
            with suppress(OSError, RuntimeError, ValueError):
                found.update(self._client.run(function, *given, workers=sorted(workers), on_error="return"))

        thread = threading.Thread(target=ask, daemon=True)  # run itself has no limit of time
        thread.start()
        thread.join(_IMPORTS)
        return dict(found)

    def _gone(self, problem: Exception) -> SpectraError:
        said = (str(problem) or type(problem).__name__).splitlines()[0]
        return SpectraError(
            f"the Dask scheduler at {self._address} does not answer any more ({said}); what is stored stays: start it "
            "anew, and run the same again"
        )

    @property
    def _max_workers(self) -> int:
        """Threads of all workers that are there now; they may come and go."""
        return max(1, sum(worker["nthreads"] for worker in self._workers().values()))

    @property
    def memory_budget(self) -> int | None:
        """Bytes for one matrix: what the smallest worker has for each of its threads; None if it has no limit."""
        workers = self._workers().values()
        limits = [worker["memory_limit"] / worker["nthreads"] for worker in workers if worker["memory_limit"]]
        return int(min(limits) * _SHARE) if limits else None


def _unfit(why: str) -> SpectraError:
    return SpectraError(f"every worker needs spectra {__version__}, as here, with all that it imports: {why}")


@contextmanager
def cluster_executor(address: str) -> Iterator[ClusterExecutor]:
    """Connect to a running Dask scheduler.

    Args:
        address: "tcp://host:8786", "tls://host:8786" or whatever the scheduler printed.

    Raises:
        MissingExtraError: distributed is not installed.
        SpectraError: nothing answers there, or it has no workers.
    """
    if not _ADDRESS.fullmatch(address):
        raise SpectraError(
            f"{address!r} is no address of a Dask scheduler: give the one that it prints, such as tcp://host:8786 "
            "(--cluster)"
        )
    try:
        from distributed import Client
    except ImportError:
        raise MissingExtraError("--cluster", "cluster") from None
    with _quiet():
        try:
            client = Client(address, timeout=_CONNECT, set_as_default=False)
        except (OSError, ValueError, TypeError, RuntimeError, ImportError) as problem:
            raise SpectraError(_unreachable(address, problem)) from None
        try:
            _wait_for_workers(client, address)
            executor = ClusterExecutor(client, address)
            executor.watch()
            yield executor
        finally:
            _close(client)


def _wait_for_workers(client: Any, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=_WAIT_FOR_WORKERS)
    except TimeoutError:
        raise SpectraError(
            f"the Dask scheduler at {address} has no workers; start some: dask worker {address}"
        ) from None


def _close(client: Any) -> None:
    """Let go of the cluster; one that is gone already is not waited for."""
    with suppress(OSError, RuntimeError):
        client.close(timeout=2)


def _unreachable(address: str, problem: Exception) -> str:
    """What to do where there is no connection."""
    if address.startswith("tls://") and isinstance(problem, TypeError):
        return f"the Dask scheduler at {address} cannot be asked: {_CERTIFICATES}"
    if address.startswith("ucx://") and isinstance(problem, TypeError | ImportError):
        return f"{address} needs the package distributed-ucxx here; the scheduler listens on tcp:// or tls://, too"
    said = (str(problem) or type(problem).__name__).splitlines()[0]
    return f"no Dask scheduler answers at {address} ({said}); start one first, and give the address that it prints"


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask's own log of lost connections left away: what it means for the run is said in one line."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("distributed", "tornado")]
    talking = [logger for logger in map(logging.getLogger, names) if not logger.disabled]
    for logger in talking:  # each has its own level and handler
        logger.disabled = True
    try:
        yield
    finally:
        for logger in talking:
            logger.disabled = False
