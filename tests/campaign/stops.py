"""Ctrl-C once to three times, at a random moment or before a change of the disk: one word, nothing half done left."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from campaign import children, disk, judges
from campaign.case import Case, HarmError
from campaign.children import Ended
from campaign.commands import COMMANDS, OUT, TIME, OfCommands, spectra_command
from campaign.kills import readable
from spectra.cli.interrupts import STOPPED

_APART = (0.0, 0.01, 0.1, 0.5)  # seconds between one Ctrl-C and the next


class Stops(OfCommands):
    """Stopped by its user, and the same command again."""

    name = "stop"
    share = 1.0
    seconds = 4 * TIME

    def run(self, case: Case, home: Path) -> str:
        rng, command = case.rng, case.kind
        right = self.bench.undisturbed(command)
        self.bench.set_up(command, home)
        times = rng.choice([1, 2, 3])
        ended = self._disturb(command, home, times, rng)
        judges.one_message(ended, f"the command after {times} Ctrl-C")
        if ended.status not in (0, STOPPED):
            raise HarmError(f"after {times} Ctrl-C it ended with {ended.status}:\n{ended.err}")
        # The second ends it at once, as a kill does: what it was writing then is removed by whoever comes next.
        left = [path.name for path in home.rglob("*.partial")] if times == 1 else []
        if left:
            raise HarmError(f"stopped, it left {left}")
        whole = command.startswith("extract") and (home / OUT).exists()
        if not COMMANDS[command].before and (home / OUT).exists():
            readable(home / OUT, right / OUT)
        again = children.call(spectra_command(self.bench.words(command)), home, seconds=TIME)
        if whole:  # a stopped extraction leaves no folder, so this one is finished, and not touched any more
            judges.one_message(again, "the same command again")
        else:
            judges.done(again, "the same command again")
        judges.same_folders(home, right)
        return "stopped and gone on" if ended.status else "too late to stop"

    def _disturb(self, command: str, home: Path, times: int, rng: random.Random) -> Ended:
        words = self.bench.words(command)
        if rng.random() < 0.5:
            number = rng.randint(1, self.bench.changes_of(command))
            first = disk.on_change(number, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(times)])
            return children.call(spectra_command(words, lambda: [_heard(), first()]), home, seconds=TIME)
        child = children.start(spectra_command(words, _heard), home, seconds=TIME)
        wait = rng.uniform(0.05, 1.2 * self.bench.time_of(command))
        for _ in range(times):
            if child.ends_within(wait):
                break
            child.kill(signal.SIGINT)
            wait = rng.choice(_APART)
        return child.wait()


def _heard() -> None:
    """Where the campaign runs in a shell's background Ctrl-C is ignored, and would be by what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
