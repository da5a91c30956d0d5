"""What lies at a path: which weight files to read, their tensors by name, and the configs beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectra.errors import NotFoundError, SourceError
from spectra.sources import safetensors_file, torch_file
from spectra.sources.tensors import TensorRef

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_FULL_FILES = (
    "model.safetensors.index.json", "model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip
_NOT_WEIGHTS = (
    "optimizer",
    "scheduler",
    "training_args",
    "rng_state",
    "scaler",
    "global_step",
    "tokenizer",
)
_MAX_JSON = 64 * 2**20


@dataclass(frozen=True)
class Folder:
    """The tensors at a path, unread.

    Attributes:
        path: what was opened, a folder or one file.
        tensors: name → reference.
        broken: name → why it cannot be read.
        config: the model's `config.json`, or {}.
        adapter_config: the adapter's `adapter_config.json`, or None.
        metadata: strings from the files' headers.
        warnings: what was chosen where there was a choice.
    """

    path: Path
    tensors: dict[str, TensorRef]
    broken: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    adapter_config: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether the files or the config beside them say that this is an adapter."""
        return self.adapter_config is not None


def open_folder(path: Path) -> Folder:
    """Read the headers of the weights at a path.

    Raises:
        NotFoundError: there are no weights.
        SourceError: an index, a config or the only weights file is broken.
    """
    if path.is_dir():
        files, broken, warnings = _choose(path)
        home = path
    else:
        files, broken, warnings, home = [path], {}, [], path.parent
    is_adapter = any(file.name.startswith("adapter_model") for file in files)
    beside_model = path.is_dir() or path.name.startswith(("model", "pytorch_model"))
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            found, lost, notes = read_header(file)
        except SourceError as problem:
            if len(files) == 1:
                raise
            warnings.append(str(problem))
            continue
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise SourceError(f"{twice[0]} is in both {tensors[twice[0]].path} and {file}; name one of the files")
        tensors.update(found)
        broken.update(lost)
        metadata.update(notes)
    broken = {name: why for name, why in broken.items() if name not in tensors}
    adapter_config = home / "adapter_config.json"
    return Folder(
        path=path,
        tensors=tensors,
        broken=broken,
        config=read_json(home / "config.json") if beside_model and (home / "config.json").is_file() else {},
        adapter_config=read_json(adapter_config)
        if adapter_config.is_file() and (is_adapter or not beside_model)
        else None,
        metadata=metadata,
        warnings=tuple(warnings),
    )


def read_header(path: Path) -> tuple[dict[str, TensorRef], dict[str, str], dict[str, str]]:
    """Tensors, broken tensors and metadata of one weights file, by its suffix.

    Raises:
        NotFoundError: there is no such file.
        SourceError: its kind is not known, or it is broken.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist; the download may be incomplete")
    if path.suffix == ".safetensors":
        return safetensors_file.read_header(path)
    if path.suffix in WEIGHT_SUFFIXES:
        return torch_file.read_header(path)
    raise SourceError(f"{path} is not a weights file: known suffixes are {', '.join(WEIGHT_SUFFIXES)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: it is not JSON, not an object, or absurdly large.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise SourceError(f"{path} is larger than {_MAX_JSON} bytes; that is no config")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as problem:
        raise SourceError(f"{path} is not readable JSON ({problem}); download or save it again") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _choose(folder: Path) -> tuple[list[Path], dict[str, str], list[str]]:
    """The weight files to read in a folder, tensors known to be lost, and what was passed over."""
    adapters = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    full = [folder / name for name in _FULL_FILES if (folder / name).is_file()]
    full = full or sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json"))
    chosen = (adapters or full or _lone_files(folder))[0:1]
    if not chosen:
        shards = _lone_files(folder, several=True)
        return [_inside(folder, file) for file in shards], {}, []
    passed_over = [file.name for file in [*adapters, *full] if file not in chosen]
    warnings = []
    if passed_over:
        warnings.append(f"{folder}: took {chosen[0].name} and left out {', '.join(passed_over)}; name a file to choose")
    if chosen[0].suffix == ".json":
        files, broken = _shards(folder, chosen[0])
        return files, broken, warnings
    return [_inside(folder, chosen[0])], {}, warnings


def _lone_files(folder: Path, several: bool = False) -> list[Path]:
    """The one file of weights in the folder whatever its name; with `several`, the numbered shards of one model."""
    found = [file for file in sorted(folder.iterdir()) if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
    found = [file for file in found if not file.name.startswith(_NOT_WEIGHTS)]
    safe = [file for file in found if file.suffix == ".safetensors"]
    found = safe or found
    if len(found) == 1 or not several:
        return found if len(found) == 1 else []
    if not found:
        inner = [item.name for item in sorted(folder.iterdir()) if item.is_dir()][:8]
        hint = f"; it has the folders {', '.join(inner)}: did you mean one of them?" if inner else ""
        raise NotFoundError(f"{folder} holds no weights ({', '.join(WEIGHT_SUFFIXES)}){hint}")
    if all("-of-" in file.name for file in found):
        return found
    raise SourceError(f"{folder} holds {len(found)} weight files: {', '.join(f.name for f in found[:8])}; name one")


def _shards(folder: Path, index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{index} has no weight_map of names to files; download it again")
    files: list[Path] = []
    broken: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise SourceError(f"{index} points outside its folder: {shard!r}; nothing was read")
        file = folder / shard
        if file.is_file():
            files.append(_inside(folder, file))
    for name, shard in weight_map.items():
        missing = not (folder / shard).is_file()
        broken[name] = (
            f"{folder / shard} is missing; download it again" if missing else f"{folder / shard} does not hold it"
        )
    if not files:
        raise NotFoundError(f"{index} names {len(set(weight_map.values()))} shards and none of them is there")
    return files, broken


def _inside(folder: Path, file: Path) -> Path:
    """The file, unless a symlink takes it out of the folder. A hub cache's snapshots may link to its blobs."""
    target = file.resolve()
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise SourceError(f"{file} is a link that leaves its folder ({target}); pass the target's own path")
    return file
