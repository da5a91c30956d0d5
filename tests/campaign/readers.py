"""Every reader on files that somebody changed: the right numbers, a refusal in one message, or a status."""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import torch
import torch.distributed.checkpoint as checkpoint
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from support import fuzz
from support.checkpoints import llama_tensors, write_checkpoint
from support.examples import EXAMPLES
from support.layouts import LAYOUTS
from support.peft_oracle import Oracle
from support.stored import stored_tensors, weight_files, write_gguf, write_tensors

import spectra
from campaign import mutations
from campaign.case import Area, Case, HarmError
from spectra.errors import SpectraError
from spectra.files.folder import open_folder

CODED = {case.replace(" ", "_"): case for case in fuzz.CODED}
RAW = ("raw-safetensors", "raw-torch", "raw-legacy", "raw-gguf", "raw-dcp", "raw-index")
MORE = ("LoRA-XS",)  # is a plain LoRA and a tensor more: without that it is another valid file
Tensors = dict[str, torch.Tensor]


class Readers(Area):
    """Files of every format, damaged with and without knowledge of it."""

    name = "readers"
    share = 4.0
    seconds = 40.0
    memory = fuzz.MEMORY

    def kinds(self) -> Sequence[str]:
        return [*EXAMPLES, *LAYOUTS, *CODED, *RAW * 6]

    def prepare(self, shelf: Path) -> None:
        super().prepare(shelf)
        self.oracles: dict[str, Oracle] = {}
        self.pairs: dict[str, tuple[Path, Path]] = {}

    def provide(self, kind: str) -> None:
        folder = self.shelf / kind
        if folder.exists():
            return
        if kind in RAW:
            write_raw(folder, kind)
        elif kind in CODED:
            self.pairs[kind] = (
                fuzz.write_coded(folder / "tuned", CODED[kind]), fuzz.write_plain(folder / "base", CODED[kind])
            )  # fmt: skip
        else:
            self.oracles[kind] = made = (EXAMPLES | LAYOUTS)[kind](folder)
            self.pairs[kind] = made.adapter, made.base

    def run(self, case: Case, home: Path) -> str:
        rng = case.rng
        if case.kind in RAW:
            shutil.copytree(self.shelf / case.kind, home / "model")
            return read_raw(case.kind, home / "model", rng)
        tuned, base = self.pairs[case.kind]
        shutil.copytree(tuned, home / "tuned")
        shutil.copytree(base, home / "base")
        oracle, chance = self.oracles.get(case.kind), rng.random()
        if oracle is not None and chance < 0.2:
            return harmless(home, oracle, rng)
        if oracle is not None and chance < 0.5:
            return without_one(home, oracle, rng, case.kind in MORE)
        for _ in range(rng.choice([1, 1, 2, 3])):
            print(fuzz.mutate(home / ("tuned" if rng.random() < 0.85 else "base"), rng), file=sys.stderr)
        return fuzz.attempt(home / "tuned", home / "base" if rng.random() < 0.8 else None, rng).split(",")[0]


def harmless(home: Path, oracle: Oracle, rng: random.Random) -> str:
    """Change what means nothing: the update is the oracle's."""
    for folder in (home / "tuned", home / "base"):
        for file in folder.glob("*.safetensors"):
            _other_order(file, rng)
        for file in folder.glob("*config.json"):
            said = json.loads(file.read_text())
            pairs = [*said.items(), ("made_by", rng.choice(["x", None, [1], {"a": 1}]))]
            rng.shuffle(pairs)
            file.write_text(json.dumps(dict(pairs), indent=rng.choice([None, 1])))
    source = spectra.open_source(home / "tuned", home / "base")
    found = decomposed(source)
    lost = [name for name in oracle.deltas if name not in found or found[name].status != "ok"]
    if lost:
        raise HarmError(f"{lost} have no number any more: {source.coverage}")
    same_numbers(source, found, oracle)
    return "harmless and right"


def decomposed(source: spectra.Source) -> dict[str, spectra.Spectrum]:
    """Name → spectrum."""
    return {spectrum.name: spectrum for spectrum in spectra.decompose(source, device="cpu", memory_budget="1GiB")}


def _other_order(file: Path, rng: random.Random) -> None:
    """The same tensors in another order in the file, in the header, and with room after the header."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", None)
    names = [*header]
    rng.shuffle(names)
    blocks, end = [], 0
    for name in names:
        begin, stop = header[name]["data_offsets"]
        blocks.append(data[begin:stop])
        header[name]["data_offsets"] = [end, end + stop - begin]
        end += stop - begin
    rng.shuffle(names)
    said = {name: header[name] for name in names} | ({} if metadata is None else {"__metadata__": metadata})
    text = json.dumps(said, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5).encode()
    text += b" " * rng.choice([0, 1, 7, 1000])
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blocks))


def without_one(home: Path, oracle: Oracle, rng: random.Random, only_renamed: bool = False) -> str:
    """One tensor is gone or has another name: what still has a number has the oracle's."""
    files = weight_files(home / "tuned")
    if len(files) != 1:
        return "several files"
    tensors = stored_tensors(home / "tuned")
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    if rng.random() < 0.5 or only_renamed:
        words = name.split(".")
        place = rng.randrange(len(words))
        words[place] = rng.choice([words[place] + "x", "x" + words[place], words[place].upper(), ""])
        tensors[".".join(words)] = tensor
    if not tensors:
        return "nothing left"
    write_tensors(files[0], tensors)
    print(f"without {name}: {sorted(tensors)}", file=sys.stderr)
    try:
        source = spectra.open_source(home / "tuned", home / "base")
        found = decomposed(source)
    except SpectraError as problem:
        return refused(problem)
    same_numbers(source, found, oracle)
    return "the others are right"


def same_numbers(source: spectra.Source, found: dict[str, spectra.Spectrum], oracle: Oracle) -> None:
    """Every matrix with a number has the oracle's."""
    for delta in source:
        status = found[delta.name].status
        if status not in ("ok", "unchanged") or delta.name not in oracle.deltas:
            continue
        wanted, got = oracle.deltas[delta.name], delta.read().to_dense()
        if got.shape != wanted.shape:
            raise HarmError(f"{delta.name} is {status} and {list(got.shape)}, not {list(wanted.shape)}")
        off = float((got - wanted).norm() / wanted.norm())
        if not off <= 10 * oracle.tolerance:
            raise HarmError(f"{delta.name} is {status} and wrong by {off:.3g} of its norm")


def refused(problem: SpectraError) -> str:
    """A refusal that is one message."""
    message = str(problem)
    if not message.strip() or "\n" in message or len(message) > 3000:
        raise HarmError(f"not one message: {message[:4000]!r}")
    return "refused"


def write_raw(folder: Path, kind: str) -> Path:
    """A small valid model in one container."""
    torch.manual_seed(0)
    tensors: Tensors = {f"layers.{i}.q_proj.weight": torch.randn(4 + i, 6) for i in range(3)}
    tensors |= {"half": torch.randn(3, 5).half(), "brain": torch.randn(2, 3).bfloat16()}
    tensors["double"] = torch.randn(7).double()
    folder.mkdir(parents=True)
    if kind == "raw-safetensors":
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif kind in ("raw-torch", "raw-legacy"):
        tensors["layers.3.q_proj.weight"] = tensors["layers.0.q_proj.weight"].T
        zipped = kind == "raw-torch"
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    elif kind == "raw-gguf":
        text = gguf.GGUFValueType.STRING
        said = {"general.architecture": ("llama", text), "general.name": ("x" * 20, text)}
        said["llama.block_count"] = (3, gguf.GGUFValueType.UINT32)
        plain = {name: tensor for name, tensor in tensors.items() if tensor.dtype is not torch.float64}
        write_gguf(folder / "model.gguf", plain, said)
    elif kind == "raw-dcp":
        writer = checkpoint.FileSystemWriter(folder)
        checkpoint.save({"model": tensors, "step": 3}, storage_writer=writer, no_dist=True)
    else:
        write_checkpoint(folder, llama_tensors(layers=1), shards=3)
    return folder


def read_raw(kind: str, folder: Path, rng: random.Random) -> str:
    """Damage the container and read all of it: equal to what its own library reads, or refused."""
    right = stored_tensors(folder) if kind == "raw-index" else None
    for _ in range(rng.choice([1, 1, 1, 2])):
        _damage(kind, folder, rng)
    try:
        opened = open_folder(folder)
        repr(opened.metadata), opened.listing
        read, refusals = {}, 0
        for name, ref in opened.tensors.items():
            try:
                read[name] = ref.read()
            except SpectraError as problem:
                refused(problem)
                refusals += 1
        spectra.open_source(folder)
    except SpectraError as problem:
        return refused(problem)
    if right is None:
        right = BY_LIBRARY[kind](folder) if kind in BY_LIBRARY else {}
    for name, tensor in read.items():
        if name in right and not _same(tensor, right[name]):
            raise HarmError(f"{name}, {tensor.dtype} {tuple(tensor.shape)}, is not what its own library reads")
    return "partly read" if refusals or opened.broken else "read"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit."""
    a, b = a.contiguous(), b.contiguous()
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(
            (a.view(torch.uint8) == b.view(torch.uint8)).all()
            if a.numel() and a.ndim
            else torch.equal(a, b) or bool(a != a)
        )
    )


def _damage(kind: str, folder: Path, rng: random.Random) -> None:
    if kind == "raw-index":
        try:
            mutations.index(folder, rng)
        except (ValueError, LookupError, TypeError, AttributeError, OSError):
            return  # too damaged already
        return
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = file.read_bytes()
    special = {"raw-safetensors": mutations.safetensors_header, "raw-torch": mutations.torch_zip}.get(kind)
    how = special if special and rng.random() < 0.7 else rng.choice(mutations.GENERAL)
    try:
        file.write_bytes(how(content, rng))
    except Exception:
        file.write_bytes(mutations.flip(content, rng) if content else b"")  # too damaged for what knows the format


def _by_safetensors(folder: Path) -> Tensors:
    return _by(lambda: load_safetensors((folder / "model.safetensors").read_bytes()))


def _by_torch(folder: Path) -> Tensors:
    return _by(lambda: torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu"))


def _by_gguf(folder: Path) -> Tensors:
    def read() -> Tensors:
        plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F64)
        entries = gguf.GGUFReader(folder / "model.gguf").tensors
        return {entry.name: torch.from_numpy(entry.data.copy()) for entry in entries if entry.tensor_type in plain}

    return _by(read)


def _by(read: Callable[[], Tensors]) -> Tensors:
    """What a library reads; nothing where it fails in whatever way."""
    try:
        found = read()
    except Exception:
        return {}
    return (
        {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        if isinstance(found, dict)
        else {}
    )


BY_LIBRARY = {
    "raw-safetensors": _by_safetensors,
    "raw-torch": _by_torch,
    "raw-legacy": _by_torch,
    "raw-gguf": _by_gguf,
}
