"""Killed at a random moment, before a change of the disk or amid one; the same command then ends as if nothing was."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import spectra
from campaign import children, disk, judges
from campaign.case import Case, HarmError
from campaign.commands import COMMANDS, OUT, TIME, OfCommands, spectra_command
from spectra.errors import StoreError


class Kills(OfCommands):
    """Killed once to three times, and the same command again."""

    name = "kill"
    share = 2.0
    seconds = 5 * TIME

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
        words, how = self.bench.words(command), rng.choice(["change", "change", "middle", "time"])
        if how == "time":
            child = children.start(spectra_command(words), home, seconds=TIME)
            if not child.ends_within(rng.uniform(0, 1.2 * self.bench.time_of(command))):
                child.kill()
            return child.wait().killed
        if how == "change":
            number = rng.randint(1, self.bench.changes_of(command))
            first = disk.on_change(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        else:  # of a file that is being written, which then has so many bytes
            size = int(2 ** rng.uniform(4, 17))
            first = lambda: disk.limit(size, fatal=True)  # noqa: E731
        return children.call(spectra_command(words, first), home, seconds=TIME).killed


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
