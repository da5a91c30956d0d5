"""Timing two ways side by side, in this process or as processes."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Sample:
    """One run: wall seconds, the peak MiB of a process (0 in this process), and seconds of all its cores together."""

    seconds: float
    mebibytes: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Medians of a case, and the ratio of the medians with the spread of the paired ratios."""

    case: str
    peer: str
    wanted: float
    ours_s: float
    peer_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ours_mib: float
    peer_mib: float
    repeats: int


Way = Callable[[], Sample]


def compare(
    case: str,
    peer_name: str,
    wanted: float,
    ours: Way,
    peer: Way,
    repeats: int,
    by: Literal["seconds", "cpu"] = "seconds",
) -> Outcome:
    """Run both in turn, so that what else the machine does hits both; `by` which of a sample's times."""
    pairs = [(ours(), peer()) for _ in range(repeats)]
    mine, theirs = ([getattr(pair[side], by) for pair in pairs] for side in (0, 1))
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    a, b = statistics.median(mine), statistics.median(theirs)
    memory = [max(pair[side].mebibytes for pair in pairs) for side in (0, 1)]
    return Outcome(case, peer_name, wanted, a, b, b / a, min(ratios), max(ratios), *memory, repeats)


def timed(work: Callable[[], object]) -> Way:
    """A way that runs in this process."""

    def run() -> Sample:
        start, cpu = time.perf_counter(), time.process_time()
        work()
        return Sample(time.perf_counter() - start, cpu=time.process_time() - cpu)

    return run


def process(*arguments: str, program: str = sys.executable) -> Way:
    """A way that runs a program, python if not named; its peak memory is measured by a parent of its own."""
    code = (
        "import resource, subprocess, sys, time; start = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(time.perf_counter() - start, used.ru_maxrss, used.ru_utime + used.ru_stime)"
    )

    def run() -> Sample:
        command = [sys.executable, "-c", code, program, *arguments]
        # else every run would compile our sources anew, which no user's second run does
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        seconds, size, cpu = output.split()
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return Sample(float(seconds), float(size) / unit, float(cpu))

    return run


def emptied(out: Path, way: Way) -> Way:
    """A way that writes a folder, which is removed before."""

    def run() -> Sample:
        shutil.rmtree(out, ignore_errors=True)
        return way()

    return run
