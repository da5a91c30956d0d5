"""What belongs to a run that has ended: `run.json` lists each piece by a mark of what it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from spectra.errors import StoreError
from spectra.results import run_file

LISTED = "made_from"


class Belonging:
    """The list of one directory. A sound file of another run, copied in, is none of its pieces.

    While a run is at work there is no list, and everything that is sound counts.

    Args:
        path: the directory's run.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, str] = {}
        self._listed: Mapping[str, str] | None = None

    def see(self, name: str, key: str) -> None:
        """Take down a piece that this run has stored, or found."""
        self.seen[name] = _mark(key)

    def list_of(self, names: list[str]) -> dict[str, str]:
        """What to list of these pieces when the run ends."""
        return {name: self.seen[name] for name in names if name in self.seen}

    def is_foreign(self, name: str, key: str) -> bool:
        """Whether another piece than this is listed under this name."""
        return self._read().get(name, _mark(key)) != _mark(key)

    def is_listed(self, name: str) -> bool:
        """Whether the list has this name, or there is no list."""
        listed = self._read()
        return not listed or name in listed

    def look_again(self) -> None:
        """Forget the list: run.json was written."""
        self._listed = None

    def _read(self) -> Mapping[str, str]:
        if self._listed is None:
            try:
                self._listed = dict(run_file.read(self.path).get(LISTED, {}))
            except StoreError:
                self._listed = {}
        return self._listed


def _mark(key: str) -> str:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
