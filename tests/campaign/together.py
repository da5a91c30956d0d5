"""Two and four processes in one folder, some of them killed: each ends well, and what is there is what one makes."""

from __future__ import annotations

from pathlib import Path

from campaign import children, judges
from campaign.case import Case, HarmError
from campaign.commands import COMMANDS, TIME, OfCommands, spectra_command

KINDS = tuple(name for name in COMMANDS if not name.endswith("-figures"))


class Together(OfCommands):
    """The same command several times at once."""

    name = "together"
    seconds = 6 * TIME

    def kinds(self) -> tuple[str, ...]:
        return KINDS

    def run(self, case: Case, home: Path) -> str:
        rng, command = case.rng, case.kind
        right = self.bench.undisturbed(command)
        self.bench.set_up(command, home)
        work = spectra_command(self.bench.words(command))
        at_work = []
        for _ in range(rng.choice([2, 2, 4])):
            child = children.start(work, home, seconds=3 * TIME)
            at_work.append(child)
            child.ends_within(rng.choice([0, 0, 0.05, 0.5]))
        victim = rng.choice(at_work) if rng.random() < 0.3 else None
        if victim:
            victim.ends_within(rng.uniform(0, 1.5 * self.bench.time_of(command)))
            victim.kill()
        ends = [child.wait() for child in at_work]
        for child, ended in zip(at_work, ends, strict=True):
            if child is not victim or not ended.killed:
                judges.one_message(ended, f"one of {len(ends)}")
        refused = [ended.err for ended in ends if ended.status > 0]
        alive = len(ends) - sum(ended.killed for ended in ends)
        if refused and (len(refused) == alive or not command.startswith("extract")):
            raise HarmError(f"{len(refused)} of {len(ends)} were refused, {alive} not killed:\n" + "\n".join(refused))
        if victim or not command.startswith("extract"):
            again = children.call(work, home, seconds=TIME)
            whole = command.startswith("extract") and again.status == 1
            judges.one_message(again) if whole else judges.done(again, "the same command again")
        judges.same_folders(home, right)
        return f"{len(ends)} at once" + (", one killed" if victim else "")
