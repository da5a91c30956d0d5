"""SIGKILL at a random moment or before a random change of the disk; the same command then ends as if nothing was."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import spectra
from campaign import children, judges
from campaign.case import Area, Case, HarmError
from campaign.commands import COMMANDS, OUT, TIME, Bench, spectra_command
from spectra.errors import StoreError

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def on_change(count: int, act: Callable[[], object]) -> Callable[[], None]:
    """Do something just before the count-th change of the disk: a file opened for writing, renamed, removed, …"""

    def install() -> None:
        left = [count]

        def watch(event: str, given: tuple) -> None:
            if event in _CHANGES or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR)):
                left[0] -= 1
                if left[0] == 0:
                    act()

        sys.addaudithook(watch)

    return install


class Kills(Area):
    """SIGKILL, once to three times, and the same command again."""

    name = "kill"
    share = 2.0
    seconds = 5 * TIME

    def kinds(self) -> list[str]:
        return list(COMMANDS)

    def prepare(self, shelf: Path) -> None:
        self.bench = Bench(shelf)

    def run(self, case: Case, home: Path) -> str:
        rng, command = case.rng, case.kind
        right = self.bench.undisturbed(command)
        self.bench.set_up(command, home)
        words, hits = self.bench.words(command), 0
        for _ in range(rng.choice([1, 1, 2, 3])):
            hits += self._disturb(command, home, rng)
        whole = command.startswith("extract") and (home / OUT).exists()
        if not COMMANDS[command].before and (home / OUT).exists():
            readable(home / OUT, right / OUT)
        ended = children.call(spectra_command(words), home, seconds=TIME)
        if whole:  # a killed extraction leaves no folder, so this one is finished, and not touched any more
            judges.one_message(ended, "the same command again")
        else:
            judges.done(ended, "the same command again")
        judges.same_folders(home, right)
        return "killed and made up for" if hits else "too late to kill"

    def _disturb(self, command: str, home: Path, rng: random.Random) -> bool:
        """Run it and kill it; whether that was in time."""
        words = self.bench.words(command)
        if rng.random() < 0.7:
            kill = on_change(1 + int(60 * rng.random() ** 2), lambda: os.kill(os.getpid(), signal.SIGKILL))
            return children.call(spectra_command(words, kill), home, seconds=TIME).killed
        child = children.start(spectra_command(words), home, seconds=TIME)
        if not child.ends_within(rng.uniform(0, 1.2 * self.bench.time_of(command))):
            child.kill()
        return child.wait().killed


def readable(found: Path, right: Path) -> None:
    """What is there after a kill can be read, as far as it goes."""
    if (right / "spectra").is_dir():
        judges.never_wrong(found, right)
    elif (right / "pairs").is_dir() or (right / "similarity").is_dir():
        try:
            spectra.check_results(found)
        except StoreError as problem:
            if not str(problem).strip():
                raise HarmError("an error without a message") from None
