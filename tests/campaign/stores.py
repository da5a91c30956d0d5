"""Results that somebody made by hand, rightly signed: a value, a status or one message, whatever they say."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from support.fuzz import ODD

import spectra
from campaign import children, judges
from campaign.case import Case, HarmError
from campaign.commands import OUT, TIME, OfCommands, spectra_command
from spectra.errors import SpectraError, StoreError
from spectra.results import run_file, shelf
from spectra.results.pack import PACK, Pack

_NESTED = [[[]], {"a": {"b": [1]}}, [None], "\x1b]0;x\x07", "\u202ex", "x" * 5000, 10**30, -(10**30), 1e-320]
_ARRAYS = [
    np.zeros(0), np.zeros((3, 3)), np.full(4, np.nan), np.array([np.inf, 1.0]), np.arange(5), np.ones(3, np.float16),
    -np.ones(2), np.array(1.0), np.zeros((2, 0)), np.ones(3, np.uint8), np.array([1.0, 2.0, 3.0]),
]  # fmt: skip
_SUMS = ["float64(-1):0", "object(3):0", "float64(9999999999999):0", "(", "float64(3)", "<U3(2):x", ":", 7]
_HOLE = 2**36  # bytes, of which hardly any are there
_READING = (
    "inspect out --verify",
    "plot out --format png",
    "report out --out page.html",
    "plot out --per-layer --format pdf",
)


class Stores(OfCommands):
    """Forged records and files that no run makes."""

    name = "store"
    share = 1.5
    seconds = 4 * TIME
    memory = 2 * 2**30

    def kinds(self) -> tuple[str, ...]:
        return ("svd", "svd-many", "similarity", "similarity-many", "series")

    def run(self, case: Case, home: Path) -> str:
        rng = case.rng
        shutil.copytree(self.bench.undisturbed(case.kind) / OUT, home / OUT)
        said = [forge(home / OUT, rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        refusals = load_all(home / OUT)
        words = rng.choice(_READING).split()
        ended = children.call(spectra_command(words), home, seconds=TIME)
        judges.one_message(ended, f"{words} after {said}")
        ended = children.call(spectra_command(self.bench.words(case.kind)), home, seconds=TIME)
        judges.one_message(ended, f"the same command after {said}")
        return "refused" if refusals else "read"


def load_all(out: Path) -> int:
    """Load and use everything there is; how often that was refused."""
    refusals = 0
    for folder in [out, *(path for path in out.rglob("*") if path.is_dir())]:
        try:
            there = spectra.load(folder)
            repr(there)
        except SpectraError as problem:
            _one_line(problem)
            continue
        for name in there.names:
            try:
                spectrum = there[name]
                repr(spectrum), spectrum.k, spectrum.rank
                spectra.summarize([spectrum])
            except SpectraError as problem:
                _one_line(problem)
                refusals += 1
        for use in (there.to_frame, lambda folder=folder: spectra.check_results(folder), lambda there=there: there.run):
            try:
                use()
            except SpectraError as problem:
                _one_line(problem)
                refusals += 1
    return refusals


def _one_line(problem: SpectraError) -> None:
    if not str(problem).strip() or "\n" in str(problem):
        raise HarmError(f"not one message: {problem}")


def forge(out: Path, rng: random.Random) -> str:
    """Change one file so that its checksums fit; says what."""
    # Not the pipes and links that an earlier forgery put there: reading those waits for ever.
    files = [path for path in out.rglob("*.safetensors") if path.is_file() and not path.is_symlink()]
    records = sorted(path for path in files if path.stat().st_size < _HOLE)
    runs = sorted(out.rglob("run.json"))
    what = rng.choice(["record", "record", "record", "array", "array", "run", "run", "file", "table"])
    if what == "run":
        path = rng.choice(runs)
        content = json.loads(path.read_text())
        return f"{path.name}: {_change(path, content, rng)}"
    if what == "table":
        path = rng.choice(sorted(out.rglob("*.csv")))
        path.write_bytes(
            rng.choice([b"", b"name\n", b"\xff\xfe", b"name,S\n" + b"x," * 10_000, path.read_bytes()[:-40]])
        )
        return path.name
    packs = sorted(path for path in out.rglob(PACK) if path.is_file() and not path.is_symlink())
    if packs and what != "file":
        return _forge_packed(rng.choice(packs), rng)
    path = rng.choice(packs or records or runs)
    if what == "file" or not records:
        return _odd_file(path, rng)
    with safe_open(path, framework="np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["signed"])
    record, sums = json.loads(said["record"]), None
    if what == "array":
        key = rng.choice([*arrays, "more"])
        if rng.random() < 0.2:
            arrays.pop(key, None)
        else:
            arrays[key] = rng.choice(_ARRAYS)
        sums = {key: shelf._sum(array) for key, array in arrays.items()}
        changed: Any = (key, arrays.get(key, np.zeros(0)).shape)
    else:
        changed = key, value = rng.choice([*record, "more"]), rng.choice([*ODD, *_NESTED])
        if rng.random() < 0.15:
            record.pop(key, None)
        else:
            record[key] = value
    said["record"] = json.dumps(record)
    said |= {} if sums is None else {"sums": json.dumps(sums)}
    said.pop("checksum")
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path, shelf.signed(said))
    return f"{path.name}: {changed}"


def _forge_packed(path: Path, rng: random.Random) -> str:
    """A record of a pack that says something else, or a new one; sealed or added."""
    pack = Pack(path.parent)
    name = rng.choice([*sorted(pack.spots), "more", "../x", "\udcff"])
    text, data = pack.read(name) if name in pack.spots else (b'{"record": {}, "sums": {}}', b"")
    said = json.loads(text)
    where = rng.choice([said, *(part for part in said.values() if isinstance(part, dict))])
    key, value = rng.choice([*where, "more"]), rng.choice([*ODD, *_NESTED, *_SUMS])
    if rng.random() < 0.2:
        where.pop(key, None)
    else:
        where[key] = value
    changed = rng.choice([json.dumps(said).encode(), json.dumps(said).encode(), b"", b"[]", b"\xff", b"{" * 2000])
    pack.add(name, changed, rng.choice([data, data, b"", data[:-3], data * 50]))
    if rng.random() < 0.5:
        pack.seal(str)
    return f"{path.name}, {name!r}: {key} = {value!r}"[:200]


def _change(path: Path, content: dict[str, Any], rng: random.Random) -> str:
    """A run.json that says something else, signed."""
    content.pop("checksum", None)
    inside = content
    for _ in range(rng.choice([0, 0, 1, 2])):
        below = [value for value in inside.values() if isinstance(value, dict) and value]
        inside = rng.choice(below) if below else inside
    key, value = rng.choice([*inside, "more"]), rng.choice([*ODD, *_NESTED])
    if rng.random() < 0.2:
        inside.pop(key, None)
    else:
        inside[key] = value
    try:
        run_file.write(path, content)
    except (StoreError, ValueError, TypeError):
        path.write_text(json.dumps(content))
    return f"{key} = {value!r}"[:200]


def _odd_file(path: Path, rng: random.Random) -> str:
    """Something else lies where a record should."""
    what = rng.choice(["folder", "link", "loop", "gone", "pipe", "other name", "long name", "big"])
    if what in ("other name", "long name"):
        name = rng.choice(["%FF", "a%00b", "%", "..%2Fx", "\udcff", "x~%~y"]) if what == "other name" else "n" * 240
        shutil.copy(path, path.with_name(f"{name}.safetensors"))
        return what
    content = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to("/etc/passwd")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "big":
        path.write_bytes(content)
        os.truncate(path, _HOLE)
    return f"{what} for {path.name}"
