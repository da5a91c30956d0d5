"""What a campaign has done so far, line by line on a disk, so that it can be stopped and go on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

_PLAN, _LINES = "plan.json", "cases.jsonl"


@dataclass(frozen=True)
class Line:
    """How one case ended.

    Attributes:
        case: its name.
        outcome: a word on it; "FAILED" if harm was done.
        seconds: how long it took.
        peak: bytes of memory beyond what the process was born with.
        failed: whether harm was done.
    """

    case: str
    outcome: str
    seconds: float
    peak: int
    failed: bool = False


class Journal:
    """The lines of one campaign in a folder: `plan.json`, `cases.jsonl`, and `failed/` with what failed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        path = home / _LINES
        said = path.read_text().splitlines() if path.exists() else []
        self.lines = [Line(**json.loads(line)) for line in said if line.endswith("}")]  # one may be cut by a kill

    @classmethod
    def of(cls, home: Path, seed: int, minutes: float) -> Journal:
        """The journal of the campaign with this seed, begun if there is none."""
        home.mkdir(parents=True, exist_ok=True)
        (home / _PLAN).write_text(json.dumps({"seed": seed, "minutes": minutes}))
        return cls(home)

    @classmethod
    def unfinished(cls, place: Path, minutes: float) -> tuple[int, Journal] | None:
        """The seed and journal of a campaign of as many minutes that was stopped before its end."""
        for plan in sorted(place.glob(f"*/{_PLAN}")):
            said = json.loads(plan.read_text())
            journal = cls(plan.parent)
            if said["minutes"] == minutes and journal.seconds() < 60 * minutes:
                return said["seed"], journal
        return None

    def write(self, line: Line) -> None:
        """Keep one more."""
        self.lines.append(line)
        with (self.home / _LINES).open("a") as file:
            file.write("\n" + json.dumps(asdict(line)))  # what a kill cut off before stays a line of its own

    def seconds(self, area: str = "") -> float:
        """How long the cases of an area took, or all."""
        return sum(line.seconds for line in self.lines if line.case.startswith(area))

    def counts(self) -> Counter[str]:
        """How many cases there were of each area and kind, as `area/kind`."""
        return Counter(line.case.rpartition("/")[0] for line in self.lines)

    @property
    def failures(self) -> list[Line]:
        """The cases that failed."""
        return [line for line in self.lines if line.failed]

    def table(self, areas: list[str]) -> str:
        """A row per area: cases, failures, seconds, worst memory, and what came of most of them."""
        return pd.DataFrame([self._row(area) for area in areas]).to_string(index=False)

    def _row(self, area: str) -> dict[str, object]:
        lines = [line for line in self.lines if line.case.startswith(f"{area}/")]
        outcomes = Counter(line.outcome for line in lines).most_common(4)
        return {
            "area": area,
            "cases": len(lines),
            "failures": sum(line.failed for line in lines),
            "seconds": round(sum(line.seconds for line in lines)),
            "worst memory": f"{max((line.peak for line in lines), default=0) / 2**20:.0f} MiB",
            "most of them": ", ".join(f"{count} {outcome}" for outcome, count in outcomes),
        }
