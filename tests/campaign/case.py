"""A case is a name, `area/kind/seed-number`: everything random in it comes from that name."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEPARATOR = "/"


class HarmError(AssertionError):
    """What must not happen, happened."""


@dataclass(frozen=True)
class Case:
    """One attempt.

    Attributes:
        area: what is attacked.
        kind: by what, or which example of it.
        seed: the campaign's.
        number: the how manieth of its kind.
    """

    area: str
    kind: str
    seed: int
    number: int

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case of a printed name."""
        area, kind, last = name.split(SEPARATOR)
        seed, number = map(int, last.split("-"))
        return cls(area, kind, seed, number)

    def __str__(self) -> str:
        return SEPARATOR.join((self.area, self.kind, f"{self.seed}-{self.number}"))

    @property
    def rng(self) -> random.Random:
        """Its dice, as new."""
        return random.Random(str(self))


class Area(ABC):
    """A way to do harm, and how to tell that none was done.

    Attributes:
        name: what it is called in cases and in the table.
        share: its part of the campaign's minutes, against the other areas'.
        seconds: how long one case may take on a busy machine.
        memory: bytes of address space a case may take; None for no bound.
    """

    name: str
    share: float = 1.0
    seconds: float = 120.0
    memory: int | None = None

    @abstractmethod
    def kinds(self) -> Sequence[str]:
        """What there is to attack, in the order of the cases."""

    def prepare(self, shelf: Path) -> None:
        """Make what all cases start from, once, in a folder of the area's own."""
        self.shelf = shelf

    def provide(self, kind: str) -> None:  # noqa: B027 - most areas need no more than `prepare`
        """Make what the cases of a kind start from, unless it is there: called before each of them is forked."""

    @abstractmethod
    def run(self, case: Case, home: Path) -> str:
        """One case in an empty folder, which is the working folder: a word on what came of it.

        Raises:
            HarmError: harm was done. Any other exception counts as that, too.
        """
