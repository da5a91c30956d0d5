"""The places where matrices are solved, and what the engine asks of each: the CPU, or a CUDA card.

Everything that looks at the machine's devices is here. Several cards are several `Device`s; one that is not a card at
all but behaves like one needs no more than these few methods.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectra.engine.memory import FRACTION_OF_FREE, memory_budget
from spectra.engine.quota import granted_cores
from spectra.errors import DeviceError

# CUDA compute capabilities with float64 at half the float32 rate: P100, V100, A100, H100 and H200, B200.
_FULL_RATE = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})


@dataclass(frozen=True)
class Device(ABC):
    """A place where matrices are solved.

    Attributes:
        name: what torch calls it.
    """

    name: str

    @abstractmethod
    def budget(self) -> int:
        """Bytes that all matrices at work may take together where nobody says: a share of what is free."""

    @property
    @abstractmethod
    def remark(self) -> str:
        """What every result that was computed here has to say of it; "" for nothing."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until what was put there so far is there for every thread."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[Callable[[], None]]:
        """A context in which a thread reads while another computes; it gives what waits for the reading to be done."""

    @abstractmethod
    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors that another thread has read into use by this one."""

    @abstractmethod
    def release(self) -> None:
        """Give back memory that is kept for later, before something is tried again with less."""


class Cpu(Device):
    """This machine's cores: one memory, and nothing to wait for."""

    def budget(self) -> int:
        """Half of the free main memory."""
        return memory_budget(None)

    @property
    def remark(self) -> str:
        """Nothing to say: what other devices are compared with."""
        return ""

    def settle(self) -> None:
        """Nothing to wait for: what was put there is there."""

    @contextmanager
    def reading(self) -> Iterator[Callable[[], None]]:
        """What is read is there at once."""
        yield lambda: None

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Every thread may use every tensor."""

    def release(self) -> None:
        """The allocator keeps nothing that another allocation could not have."""


class Cuda(Device):
    """A CUDA card, with a stream for reading beside the one that computes."""

    def budget(self) -> int:
        """Half of the card's free memory."""
        return int(self._asked(torch.cuda.mem_get_info)[0] * FRACTION_OF_FREE)

    @property
    def remark(self) -> str:
        """That the card is slow at float64, where it is."""
        return slow_double(*self._asked(torch.cuda.get_device_capability))

    def settle(self) -> None:
        """Wait for all of the card's streams."""
        self._asked(torch.cuda.synchronize)

    def _asked(self, question: Callable[[str], Any]) -> Any:
        """The card's answer.

        Raises:
            DeviceError: it gives none, as after a failure in this process.
        """
        try:
            return question(self.name)
        except RuntimeError as problem:
            said = str(problem).splitlines()[0]
            raise DeviceError(
                f"{self.name} does not answer: {said}; start anew, or use device=cpu (--device)"
            ) from problem

    @contextmanager
    def reading(self) -> Iterator[Callable[[], None]]:
        """Copy and form what follows on a stream of its own, so that it goes on while another thread computes."""
        stream = torch.cuda.Stream(self.name)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            yield stream.synchronize

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Tell the allocator that this thread's stream uses what was allocated on the reader's."""
        stream = torch.cuda.current_stream(self.name)
        for tensor in tensors:
            tensor.record_stream(stream)

    def release(self) -> None:
        """Empty the allocator's cache."""
        torch.cuda.empty_cache()


def cores() -> int:
    """How many cores of this machine's CPU the matrices may take together: torch's, and no more than are granted."""
    return min(torch.get_num_threads(), granted_cores() or torch.get_num_threads())


def device_named(name: str) -> Device:
    """The device that torch calls so, whether or not it is there."""
    return Cuda(name) if name.startswith("cuda") else Cpu(name)


def resolve_device(name: str) -> str:
    """The device that "auto" means here, or the one asked for if it exists.

    Raises:
        DeviceError: it does not, or is not one that this toolkit uses.
    """
    if name == "cpu":
        return name
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not re.fullmatch("[0-9]{1,4}", index)):
        raise DeviceError(f"device {name!r} is not one of auto, cpu, cuda, cuda:0, …")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise DeviceError(f"device {name!r} is not there: torch sees {count} CUDA devices; use --device cpu")
    return name


def full_rate_double(major: int, minor: int) -> bool:
    """Whether a CUDA card of a compute capability computes float64 at full rate: half of its float32 rate.

    On all other cards it runs at 1/32 or 1/64, and a capability that is not known here counts as such. The
    engine then does the same: float64 on the card, for an update's factors cost little anywhere, and for dense
    updates even 1/64 of a card is as fast as several CPU cores; float32 would not keep 1e-7·σ₁. What it does
    differently is to say so: each result's `method` ends with `slow_double`'s note, and `--device cpu` is the
    other exact choice. `python -m benchmarks.gpu` measures both on the card at hand.

    Example:
        >>> [full_rate_double(*capability) for capability in [(8, 0), (8, 6), (9, 0), (12, 0)]]
        [True, False, True, False]

    Reference: NVIDIA, CUDA C++ Programming Guide, "Arithmetic Instructions" (throughput by compute capability).
    """
    return (major, minor) in _FULL_RATE


def slow_double(major: int, minor: int) -> str:
    """What to say of a card whose float64 is slow; "" of one where it is not.

    Example:
        >>> slow_double(8, 9)
        'float64 on a card that is slow at it (compute capability 8.9)'
        >>> slow_double(9, 0)
        ''
    """
    if full_rate_double(major, minor):
        return ""
    return f"float64 on a card that is slow at it (compute capability {major}.{minor})"
