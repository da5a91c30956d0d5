"""Bits that flip, blocks that vanish, files that change places among results: said, never loaded, made anew."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np

import spectra
from campaign import children, judges
from campaign.case import Case, HarmError
from campaign.commands import OUT, TIME, OfCommands, spectra_command
from spectra.errors import StoreError
from spectra.results.store import Store

KINDS = ("svd", "svd-many", "svd-lora", "similarity", "similarity-many", "series", "alignment")
_SIGNED = ("run.json", "summary.csv", "similarity.csv")


class Flips(OfCommands):
    """Damage to what is stored."""

    name = "flip"
    share = 2.0
    seconds = 3 * TIME

    def kinds(self) -> tuple[str, ...]:
        return KINDS

    def run(self, case: Case, home: Path) -> str:
        rng = case.rng
        right = self.bench.undisturbed(case.kind)
        shutil.copytree(right / OUT, home / OUT)
        signed = [path for path in sorted((home / OUT).rglob("*")) if is_signed(path)]
        files = rng.sample(signed, rng.choice([1, 1, 1, 2, 3]))
        harms = [damage(file, signed, rng) for file in files]
        changed = [path for path in signed if path.read_bytes() != (right / path.relative_to(home)).read_bytes()]
        found = folders_with_results(home / OUT)
        for folder in found:
            if (folder / "spectra").is_dir():
                judges.never_wrong(folder, right / folder.relative_to(home))
            never_wrong_comparisons(folder, right / folder.relative_to(home))
        noticed(changed, found)
        ended = children.call(spectra_command(self.bench.words(case.kind)), home, seconds=TIME)
        judges.done(ended, f"the same command after {harms}")
        unsaid = [path.name for path in changed if is_a_result(path) and not _said(path, ended.err)]
        if unsaid:
            raise HarmError(f"{unsaid} of {harms} was computed again without a word:\n{ended.err}")
        judges.same_folders(home, right)
        return "found and computed again" if changed else "nothing changed"


def is_signed(path: Path) -> bool:
    """Whether the file carries a checksum, or its run.json has it."""
    return path.is_file() and (path.suffix in (".safetensors", ".pack") or path.name in _SIGNED)


def is_a_result(path: Path) -> bool:
    """Whether it is a record that the command reuses, not a cache or a table."""
    return path.parent.name in ("spectra", "similarity") or path.name == "run.json"


def _said(path: Path, words: str) -> bool:
    return path.name in words and "damaged" in words


def folders_with_results(out: Path) -> list[Path]:
    """The results directory itself and those inside it."""
    return sorted({path.parent for path in out.rglob("*") if path.name in ("spectra", "similarity") and path.is_dir()})


def damage(file: Path, others: list[Path], rng: random.Random) -> str:
    """Do one thing to a file; says what."""
    content = bytearray(file.read_bytes())
    kind = rng.choice(["bit", "bit", "bits", "zeros", "cut", "longer", "swapped", "empty", "noise"])
    start = _numbers(content) if rng.random() < 0.5 else 0
    place = rng.randrange(start, len(content)) if start < len(content) else 0
    if kind in ("bit", "bits") and content:
        content[place] ^= 1 << rng.randrange(8)
        for _ in range(0 if kind == "bit" else rng.randint(1, 8)):
            content[rng.randrange(start, len(content))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        end = min(len(content), place + rng.choice([1, 8, 512]))
        content[place:end] = bytes(end - place)
    elif kind == "cut":
        del content[place:]
    elif kind == "longer":
        content += rng.randbytes(rng.choice([1, 8, 4096])).strip() or b"0"  # JSON says the same with a space behind it
    elif kind == "empty":
        content.clear()
    elif kind == "noise":
        content[place:] = rng.randbytes(len(content) - place)
    elif kind == "swapped":
        other = rng.choice([one for one in others if one.parent == file.parent])
        content, mine = bytearray(other.read_bytes()), bytes(content)
        other.write_bytes(mine)
        kind = f"swapped with {other.name}"
    file.write_bytes(content)
    return f"{kind} in {file.name}"


def _numbers(content: bytes) -> int:
    """Where the numbers of a safetensors file begin; 0 in any other."""
    start = 8 + int.from_bytes(content[:8], "little")
    return start if start < len(content) else 0


def noticed(changed: list[Path], folders: list[Path]) -> None:
    """`check_results` calls every changed file that it speaks of damaged, and speaks of all but caches."""
    for folder in folders:
        try:
            states = {folder / item.file: item.state for item in spectra.check_results(folder)}
        except StoreError:
            states = {}
        for path in changed:
            inside = path.parent in (folder, folder / "spectra", folder / "similarity")
            table = path.suffix == ".csv"  # known to run.json alone, which may be damaged, too
            if inside and states.get(path) != "damaged" and not table:
                raise HarmError(f"{path.name} was changed, and check_results says {states.get(path)}")


def never_wrong_comparisons(found: Path, right: Path) -> None:
    """As `judges.never_wrong`, of comparisons."""
    expected = {(item.name, item.side): item for item in Store(right).similarities()}
    store = Store(found)
    for label in store.similarity.names():
        try:
            item, _ = store.compared(label)
        except StoreError:
            continue
        wanted = expected.get((item.name, item.side))
        same = (np.array_equal(getattr(item, key), getattr(wanted, key, None)) for key in ("grid", "angles"))
        if wanted is None or not all(same):
            raise HarmError(f"a wrong comparison of {item.name}, {item.side}, was loaded")
