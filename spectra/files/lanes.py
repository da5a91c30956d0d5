"""Requests side by side: how many at a time in this process, and how large the pieces are that they ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from spectra.files.patience import give_up

PIECE = 8 * 2**20  # bytes per request of what is large: enough to hide a round trip, little to ask for again
LANES = 8  # requests at a time in this process

lanes = threading.BoundedSemaphore(LANES)
_Found = TypeVar("_Found")


class Sink(Protocol):
    """Where bytes go that come one after the other: a buffer, or what behaves as one."""

    def __len__(self) -> int: ...

    def __setitem__(self, part: slice, content: bytes, /) -> None: ...


def all_of(piece: Callable[[int], _Found], starts: Sequence[int]) -> list[_Found]:
    """What each piece gives, by where it starts, several at work at a time."""
    if len(starts) < 2:
        return [piece(start) for start in starts]
    pool = ThreadPoolExecutor(min(LANES, len(starts)))
    try:
        return list(pool.map(piece, starts))
    except KeyboardInterrupt:
        give_up()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
