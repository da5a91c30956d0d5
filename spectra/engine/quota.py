"""What of this machine a container or a batch system grants: Linux's control groups, of both versions.

Neither the number of processors nor the kernel's estimate of free memory tells of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def granted_cores() -> int | None:
    """Cores whose time this process may use, rounded up; None if nothing limits it.

    Reference: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max), scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    found = [_quotient(*_text(group / "cpu.max").split()[:2]) for group in _groups("")]
    found += [_quotient(_text(g / "cpu.cfs_quota_us"), _text(g / "cpu.cfs_period_us")) for g in _groups("cpu")]
    return max(1, math.ceil(min(found))) if min(found, default=math.inf) < math.inf else None


def granted_memory() -> int | None:
    """Bytes that may still be had, cached file contents among them; None if nothing limits it.

    Reference: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max), cgroup-v1/memory.rst.
    """
    found = [_left(group, "memory.max", "memory.current", "") for group in _groups("")]
    found += [_left(g, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_") for g in _groups("memory")]
    return max(0, int(min(found))) if min(found, default=math.inf) < math.inf else None


def _groups(controller: str) -> Iterator[Path]:
    """This process's group and those that it is in, of one controller of version 1, or "" for version 2.

    Inside a container the root may be its own group, and the path one of the host's.
    """
    for line in _text(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = GROUPS / controller
            own = root / path.lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(root) and group.is_dir())


def _left(group: Path, most: str, used: str, prefix: str) -> float:
    limit, now = _number(_text(group / most)), _number(_text(group / used))
    if math.inf in (limit, now):
        return math.inf
    cached = {f"{prefix}inactive_file", f"{prefix}active_file"}
    rows = (line.split() for line in _text(group / "memory.stat").splitlines())
    return limit - now + sum(int(row[1]) for row in rows if row[0] in cached)


def _quotient(quota: str = "", period: str = "") -> float:
    share = _number(quota) / _number(period)
    return share if share > 0 else math.inf  # -1: no limit


def _number(text: str) -> float:
    try:
        return float(int(text))
    except ValueError:  # "max", or nothing to read
        return math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
