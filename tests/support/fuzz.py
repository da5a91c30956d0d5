"""Mutate valid files and open them: every case ends in a Source, a status or one SpectraError, soon and small.

A case is `format:number`: the mutation and the options come from it, so that one that once failed can be
kept. `python -m support.fuzz --minutes 10` (in tests/) runs fresh cases and prints the ones that fail;
`tests/fuzz_cases.txt` keeps them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError

import spectra
from spectra.errors import SpectraError
from support.examples import EXAMPLES
from support.layouts import LAYOUTS
from support.stored import stored_tensors, weight_files, write_tensors
from support.stored_codes import write_coded, write_plain

SECONDS = 10  # for one case, on a loaded machine; most take milliseconds
MEMORY = 2 * 2**30  # beyond what the process already maps
# One of each format of quantised weights, beside the examples of FORMATS.
CODED = ("nf4 nested", "int8", "mlx experts", "gptq 3 bits in act-order", "awq", "compressed asymmetric", "mxfp4")
ODD = [
    None, 0, -1, 1, 2**40, 2**63, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "LORA", "\x00",
    [], [1], {}, {"x": 1}, True, False, "(" * 50, "(a+)+$",
]  # fmt: skip
# What other readers raise on a file that an earlier mutation has damaged.
_TOO_DAMAGED = (
    SafetensorError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, struct.error, OverflowError,
    pickle.UnpicklingError, EOFError, OSError, yaml.YAMLError,
)  # fmt: skip


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one thing in a folder in place; says what."""
    kinds = [_config_value, _config_text, _header, _bytes, _truncate, _rename, _retype, _reshape, _poison, _drop]
    chosen = rng.choice(kinds)
    try:
        return f"{chosen.__name__}: {chosen(folder, rng)}"
    except _TOO_DAMAGED:
        return f"{chosen.__name__}: too damaged already"


def _config(folder: Path, rng: random.Random) -> Path | None:
    found = sorted(folder.glob("*.json")) or sorted(folder.glob("*.yaml"))
    return rng.choice(found) if found else None


def _config_value(folder: Path, rng: random.Random) -> str:
    path = _config(folder, rng)
    if path is None:
        return "no config"
    read, write = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    content = read(path.read_text())
    keys = sorted(content) or ["r"]
    key = rng.choice([*keys, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "model_type"])
    if rng.random() < 0.2:
        content.pop(key, None)
        value = "removed"
    else:
        value = content[key] = rng.choice(ODD)
    path.write_text(write(content))
    return f"{path.name} {key} = {value!r}"


def _config_text(folder: Path, rng: random.Random) -> str:
    path = _config(folder, rng)
    if path is None:
        return "no config"
    text = rng.choice([b"", b"[1]", b'"x"', b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": NaN}', b"{}"])
    path.write_bytes(text)
    return f"{path.name} = {text[:20]!r}"


def _weights(folder: Path, rng: random.Random) -> Path:
    return rng.choice(weight_files(folder) or sorted(file for file in folder.iterdir() if file.is_file()))


def _header(folder: Path, rng: random.Random) -> str:
    path = _weights(folder, rng)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    field = rng.choice(["dtype", "shape", "data_offsets", "name", "all"])
    value = rng.choice([*ODD, "F8_E4M3", "I64", "BF16", [-1], [0], [2**40, 2**40], [0, 2**62], [1, 0]])
    if field == "name":
        header[str(value)] = header.pop(name)
    elif field == "all":
        header[name] = value
    else:
        header[name][field] = value
    text = json.dumps(header).encode()
    size = rng.choice([len(text), len(text), len(text), 0, 2**20, 2**62])
    path.write_bytes(struct.pack("<Q", size) + text + content[8 + length :])
    return f"{path.name} {name}.{field} = {value!r}, length {size}"


def _bytes(folder: Path, rng: random.Random) -> str:
    path = _weights(folder, rng)
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(min(len(content), rng.choice([16, 400, len(content)])))
        content[place] = rng.randrange(256)
    path.write_bytes(content)
    return path.name


def _truncate(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(file for file in folder.iterdir() if file.is_file()))
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return path.name


def _edit(folder: Path, rng: random.Random, change) -> str:
    path = _weights(folder, rng)
    tensors = stored_tensors(folder) if len(weight_files(folder)) == 1 else {}
    if not tensors:
        return "sharded"
    name = rng.choice(sorted(tensors))
    said = change(tensors, name)
    write_tensors(path, tensors)
    return f"{name}: {said}"


def _rename(folder: Path, rng: random.Random) -> str:
    def change(tensors, name):
        words = name.split(".")
        place = rng.randrange(len(words))
        words[place] = rng.choice(
            ["", "x", "0", "weight", "lora_A", "lora_B", "default", words[place] + "0", "bias", "[q]"]
        )
        tensors[".".join(words) if rng.random() < 0.8 else rng.choice(["", ".", "weight", "a" * 5000])] = tensors.pop(
            name
        )
        return ".".join(words)

    return _edit(folder, rng, change)


def _retype(folder: Path, rng: random.Random) -> str:
    def change(tensors, name):
        dtype = rng.choice([torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float16])
        tensors[name] = tensors[name].to(dtype)
        return dtype

    return _edit(folder, rng, change)


def _reshape(folder: Path, rng: random.Random) -> str:
    def change(tensors, name):
        x = tensors[name]
        options = [x[None], x.flatten(), x[:0], x[..., :1], x.T if x.ndim == 2 else x, torch.cat([x, x]), x.sum()]
        tensors[name] = rng.choice(options)
        return tuple(tensors[name].shape)

    return _edit(folder, rng, change)


def _poison(folder: Path, rng: random.Random) -> str:
    def change(tensors, name):
        if not tensors[name].is_floating_point() or not tensors[name].numel():
            return "left"
        value = rng.choice([float("nan"), float("inf"), 1e308, 0.0, 5e-324])
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value
        return value

    return _edit(folder, rng, change)


def _drop(folder: Path, rng: random.Random) -> str:
    if rng.random() < 0.3:
        path = rng.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
        path.unlink()
        return path.name

    def change(tensors, name):
        if len(tensors) > 1:
            del tensors[name]
        return "dropped"

    return _edit(folder, rng, change)


def attempt(tuned: Path, base: Path | None, rng: random.Random) -> str:
    """Open and decompose; what came of it. Anything but a SpectraError escapes."""
    options = {
        "split": rng.random() < 0.7,
        "heads": rng.choice(["mean", "mean", "sum", "each", 0, 7]),
        "scale": rng.choice([None, None, None, 0.5]),
    }
    try:
        source = spectra.open_source(tuned, base, **options)
        str(source.coverage), repr(source)
        found = list(spectra.decompose(source, top=rng.choice([None, 2]), device="cpu", memory_budget="1GiB"))
    except SpectraError as problem:
        message = str(problem)
        assert message.strip(), "an error without a message"
        assert "\n" not in message, f"a message of several lines: {message!r}"
        return "refused"
    spectra.summarize(found)
    return ",".join(sorted({spectrum.status for spectrum in found})) or "nothing"


def run_case(case: str, originals: dict[str, tuple[Path, Path]], work: Path) -> str:
    """One case, from its name alone."""
    rng = random.Random(case)
    kind = case.partition(":")[0]
    target, base = work / "tuned", work / "base"
    for source, copy in zip(originals[kind], (target, base), strict=True):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
    damaged = [mutate(target if rng.random() < 0.85 else base, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    use_base = base if rng.random() < 0.8 else None
    signal.alarm(SECONDS)
    try:
        outcome = attempt(target, use_base, rng)
    except BaseException:
        print(f"{case}: {damaged}", file=sys.stderr)
        raise
    finally:
        signal.alarm(0)
    return outcome


def build(folder: Path) -> dict[str, tuple[Path, Path]]:
    """kind → (tuned, base) of every example, of other layouts, and of checkpoints in codes."""
    made = {kind: example(folder / kind) for kind, example in (EXAMPLES | LAYOUTS).items()}
    pairs = {kind: (oracle.adapter, oracle.base) for kind, oracle in made.items()}
    for case in CODED:
        kind = case.replace(" ", "_")
        pairs[kind] = (write_coded(folder / kind / "tuned", case), write_plain(folder / kind / "base", case))
    return pairs


def limit() -> None:
    """Bound memory and time, so that an endless loop or allocation is a failure and not a frozen machine."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))

    def late(*_):
        raise AssertionError(f"not finished within {SECONDS} s")

    signal.signal(signal.SIGALRM, late)


def main() -> int:
    """Run cases and print those that fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=0, help="fresh cases for this long")
    parser.add_argument("--count", type=int, default=0, help="this many fresh cases of each format")
    parser.add_argument("--only", nargs="*", default=[], help="kinds of which there are fresh cases; all if none")
    parser.add_argument("--start", type=int, default=0, help="number of the first fresh case")
    parser.add_argument("--cases", type=Path, help="a file of cases to run first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.cases.read_text().split() if options.cases else []
    with tempfile.TemporaryDirectory() as name:
        originals = build(Path(name) / "originals")
        limit()
        end = time.monotonic() + 60 * options.minutes
        failed: list[str] = []
        outcomes: dict[str, int] = {}
        kinds = options.only or sorted(originals)
        for case in _cases(kept, kinds, options.start, options.count, end):
            try:
                outcome = run_case(case, originals, Path(name))
            except Exception:
                traceback.print_exc(limit=-3)
                failed.append(case)
                outcome = "FAILED"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(f"{sum(outcomes.values())} cases: {outcomes}")
    print("failed:", *failed)
    return bool(failed)


def _cases(kept: list[str], kinds: list[str], start: int, count: int, end: float) -> Iterator[str]:
    yield from kept
    for number in itertools.count(start):
        if number >= start + count and time.monotonic() >= end:
            return
        yield from (f"{kind}:{number}" for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
