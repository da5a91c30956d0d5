"""Main memory: how much of it may be used, and how sizes are written and read."""

from __future__ import annotations

import os
import re

from spectra.engine.quota import granted_memory
from spectra.errors import SelectionError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
FRACTION_OF_FREE = 0.5  # of what is free: used where no budget is given


def memory_budget(given: int | str | None) -> int:
    """Bytes from a number, a text such as "4GiB", or half of what is free.

    Raises:
        SelectionError: the text is not a size.

    Example:
        >>> memory_budget("4GiB")
        4294967296
    """
    if given is None:
        return int(free_memory() * FRACTION_OF_FREE)
    if isinstance(given, int):
        return given
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", given)
    if not match or match[2].upper() not in _UNITS:
        raise SelectionError(f"{given!r} is not a size; write it as 4GiB or 800MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def free_memory() -> int:
    """Bytes that can be had without swapping, and within what a container or a batch system grants."""
    granted = granted_memory()
    return _free_on_machine() if granted is None else min(granted, _free_on_machine())


def _free_on_machine() -> int:
    """By the kernel's own estimate where it gives one."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def readable_size(count: int) -> str:
    """Bytes as people write them.

    >>> readable_size(3 * 2**29)
    '1.5 GiB'
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
