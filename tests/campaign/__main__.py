"""Run the campaign: cases of every area by turns until the minutes are over; a table at the end, 1 if one failed."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from campaign import children
from campaign.case import Area, Case
from campaign.journal import Journal, Line

_LARGEST = 64 * 2**20  # bytes of a case that failed which are kept


def attempt(area: Area, case: Case, home: Path) -> tuple[Line, str]:
    """Run a case in a process of its own; how it ended, and why it failed."""
    area.provide(case.kind)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    answer = home.with_name("outcome")
    answer.unlink(missing_ok=True)

    def work() -> None:
        answer.write_text(area.run(case, home))

    ended = children.call(work, home, seconds=area.seconds, memory=area.memory, leads=True)
    failed = ended.status != 0 or ended.late or not answer.exists()
    why = "" if not failed else f"status {ended.status}{', not done in time' * ended.late}\n{ended.err}"
    outcome = "FAILED" if failed else answer.read_text()
    return Line(str(case), outcome, ended.seconds, ended.peak, failed), why


def keep(case: Case, home: Path, why: str, place: Path) -> Path:
    """Save what a failed case left, and why it failed."""
    kept = place / str(case).replace("/", "-")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    (kept / "why.txt").write_text(f"python -m campaign --case {case}\n\n{why}", errors="backslashreplace")
    size = sum(path.lstat().st_size for path in home.rglob("*"))
    if size <= _LARGEST:
        with contextlib.suppress(shutil.Error):
            shutil.copytree(home, kept / "home", symlinks=True)
    return kept


def campaign(areas: Mapping[str, Area], journal: Journal, seed: int, minutes: float, work: Path) -> None:
    """Cases of the area that had least of its share of the time, until the time is over."""
    numbers = journal.counts()
    spent = {name: journal.seconds(f"{name}/") for name in areas}
    while sum(spent.values()) < 60 * minutes:
        name = min(areas, key=lambda name: spent[name] / areas[name].share)
        kinds = Counter(areas[name].kinds())  # one that is named twice has twice as many cases
        kind = min(kinds, key=lambda kind: numbers[f"{name}/{kind}"] / kinds[kind])
        case = Case(name, kind, seed, numbers[f"{name}/{kind}"])
        begun = time.monotonic()
        line, why = attempt(areas[name], case, work / "home")
        journal.write(line)
        numbers[f"{name}/{kind}"] += 1
        spent[name] += max(line.seconds, time.monotonic() - begun)
        if line.failed:
            kept = keep(case, work / "home", why, journal.home / "failed")
            print(f"FAILED {case}: {last_line(why)}\n       kept in {kept}", flush=True)


def last_line(why: str) -> str:
    """What to print of a failure: the last line that says something."""
    lines = [line for line in why.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("campaign.case.HarmError", "AssertionError"))]
    return (named or lines or ["no word"])[-1][:300]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, prepare, run."""
    from campaign.areas import AREAS

    parser = argparse.ArgumentParser(prog="python -m campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="for all areas together")
    parser.add_argument("--areas", nargs="*", choices=AREAS, default=list(AREAS), help="only these")
    parser.add_argument("--seed", type=int, help="of a campaign; else an unfinished one goes on, or a new one begins")
    parser.add_argument("--case", nargs="*", default=[], help="only these cases, by the names that were printed")
    parser.add_argument("--keep", type=Path, default=Path("build/campaign"), help="where journals and failures go")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the case at work, as Ctrl-C does
    os.environ |= {"HF_HUB_OFFLINE": "1", "SPECTRA_CONFIG": os.devnull, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    with tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True) as name:
        if options.case:
            return again([Case.parse(case) for case in options.case], AREAS, Path(name), options.keep)
        seed, journal = begin(options.keep, options.seed, options.minutes)
        print(f"campaign {seed}: {options.minutes:g} minutes, {journal.seconds() / 60:.1f} done before", flush=True)
        areas = {name: AREAS[name] for name in options.areas}
        try:
            ready(areas, Path(name))
            campaign(areas, journal, seed, options.minutes, Path(name))
        except KeyboardInterrupt:
            print("stopped; the same command goes on")
        print(journal.table(options.areas))
        for line in journal.failures:
            print(f"python -m campaign --case {line.case}")
        return int(bool(journal.failures))


def begin(place: Path, seed: int | None, minutes: float) -> tuple[int, Journal]:
    """The campaign of a seed, or an unfinished one, or a new one."""
    if seed is None and (going := Journal.unfinished(place, minutes)):
        return going
    chosen = random.SystemRandom().randrange(10**6) if seed is None else seed
    return chosen, Journal.of(place / str(chosen), chosen, minutes)


def ready(areas: Mapping[str, Area], work: Path) -> None:
    """Import and make what all cases share, so that a forked process has it from its first moment on."""
    import matplotlib as mpl
    import torch
    from tqdm import tqdm

    mpl.use("Agg")
    tqdm.monitor_interval = 0  # a process with threads is not forked
    torch.set_num_threads(1)
    for name in modules():
        importlib.import_module(name)
    for name, area in areas.items():
        area.prepare(work / "shelf" / name)


def modules() -> Iterator[str]:
    """The library's, but for those that train."""
    import spectra

    for module in pkgutil.walk_packages(spectra.__path__, "spectra."):
        if not module.name.startswith(("spectra.reproduce", "spectra.training")) and "__main__" not in module.name:
            yield module.name


def again(cases: list[Case], areas: Mapping[str, Area], work: Path, place: Path) -> int:
    """Cases by name, with all that they say."""
    ready({case.area: areas[case.area] for case in cases}, work)
    failed = 0
    for case in cases:
        line, why = attempt(areas[case.area], case, work / "home")
        failed += line.failed
        print(f"{case}: {line.outcome}, {line.seconds:.1f} s, {line.peak / 2**20:.0f} MiB\n{why}")
        if line.failed:
            print("kept in", keep(case, work / "home", why, place / "failed"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
