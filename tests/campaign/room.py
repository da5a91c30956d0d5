"""A full disk: one message that says so, and with room the same command ends as if nothing had been."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

from campaign import children, judges
from campaign.case import Case, HarmError
from campaign.commands import COMMANDS, OUT, TIME, OfCommands, spectra_command
from campaign.disk import limit, no_room, on_change
from campaign.kills import readable

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_PRIVATE, _REMOUNT = (1 << 18) | (1 << 14), 32  # MS_PRIVATE | MS_REC, MS_REMOUNT


class Room(OfCommands):
    """Writing fails: at a random file, beyond a random size, or on a small disk in memory where that is allowed."""

    name = "disk"
    seconds = 4 * TIME

    def run(self, case: Case, home: Path) -> str:
        rng, command = case.rng, case.kind
        right = self.bench.undisturbed(command)
        words, how = self.bench.words(command), rng.choice(["error", "limit", "disk"])
        size = rng.choice([1, 4, 16, 64, 256]) * 1024
        if how == "disk" and not small_disk(home, size):
            how = "limit"
        place = home / "disk" if how == "disk" else home
        place.mkdir(exist_ok=True)
        try:
            self.bench.set_up(command, place)
        except shutil.Error:
            return "no room to begin"
        before = {
            "error": on_change(rng.randint(1, self.bench.changes_of(command)), no_room),
            "limit": lambda: limit(size),
            "disk": lambda: None,
        }
        ended = children.call(spectra_command(words, before[how]), place, seconds=TIME)
        judges.one_message(ended, f"{how} of {size} bytes: the command")
        if ended.status and not says_where(ended.err):
            raise HarmError(f"{how}: not said what cannot be written:\n{ended.err}")
        if (place / OUT).is_dir() and not COMMANDS[command].before:
            readable(place / OUT, right / OUT)
        if how == "disk":
            grow(place)
        whole = command.startswith("extract") and not ended.status
        if not whole:
            judges.done(children.call(spectra_command(words), place, seconds=TIME), "the same command with room")
        judges.same_folders(place, right)
        return f"{how}: {'said' if ended.status else 'enough room'}"


def says_where(words: str) -> bool:
    """Whether the message is about writing."""
    return any(said in words for said in ("cannot be written", "cannot be made", "No space", "too large"))


def small_disk(home: Path, size: int) -> bool:
    """Mount a disk in memory at `disk`, seen by this process and its children only; whether that is allowed."""
    (home / "disk").mkdir(exist_ok=True)
    system = ctypes.CDLL(None, use_errno=True)
    if system.unshare(_NEW_MOUNTS) or system.mount(None, b"/", None, _PRIVATE, None):
        return False
    return not system.mount(b"tmpfs", bytes(home / "disk"), b"tmpfs", 0, f"size={size}".encode())


def grow(place: Path) -> None:
    """Give the small disk room."""
    if ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", bytes(place), b"tmpfs", _REMOUNT, b"size=64m"):
        raise OSError(ctypes.get_errno(), "the small disk cannot grow")
