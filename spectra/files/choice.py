"""Which files of a folder hold the weights: one format is taken, and what is passed over is said."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any

from spectra.errors import NotFoundError, SourceError
from spectra.files import dcp, limits, snapshots, training_state
from spectra.files.storage import Place

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".lora")
ADAPTER_FILES = (
    "adapter_model.safetensors", "adapter_model.bin",  # PEFT
    "adapters.safetensors",  # MLX, whose numbered checkpoints lie beside it
    "adapter.safetensors", "pytorch_adapter.bin",  # AdapterHub
    "lit_model.pth.lora",  # LitGPT, which merges it into lit_model.pth beside it
)  # fmt: skip
FULL_NAMES = ("model", "pytorch_model", "diffusion_pytorch_model")  # what a file of full weights is called
PIPELINE = "model_index.json"
_FULL_FILES = (
    "model.safetensors.index.json", "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model.bin",
)  # fmt: skip
KNOWN_NAMES = (  # what is asked for where a folder cannot be listed
    *ADAPTER_FILES, *_FULL_FILES, PIPELINE, "config.json", "adapter_config.json",
)  # fmt: skip
_NOT_WEIGHTS = (
    "optimizer", "scheduler", "training_args", "rng_state", "random_states", "scaler", "global_step", "tokenizer",
    "sampler", "trainer_state",
)  # fmt: skip
_OTHER_FRAMEWORKS = (".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".mlmodel", ".npz")
_SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.)")
_MAX_SHARDS = 100_000


@dataclass
class Choice:
    """The weight files of one folder.

    Attributes:
        files: what to read.
        expected: tensor → the shard that its index names; {} without an index.
        broken: tensor → why no file can hold it.
        warnings: what was passed over.
        home: the folder that the index's shards are named from.
    """

    files: list[Place]
    expected: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    home: Place | None = None


def choose(folder: Place) -> Choice:
    """The files to read: an adapter before full weights, safetensors before pickles, an index before one file.

    Raises:
        NotFoundError: there are none.
        SourceError: several files could be meant, an index is unusable, or a link leaves the folder.
    """
    candidates = named(folder)
    stale = [file for file in candidates if file.suffix == ".json" and _is_stale(folder, file)]
    if len(stale) < len(candidates):
        candidates = [file for file in candidates if file not in stale]
    if candidates:
        choice = _shards(folder, candidates[0]) if candidates[0].suffix == ".json" else Choice([candidates[0]])
    else:
        choice = Choice(_unnamed(folder))
    choice.warnings += [f"{file} was left out: none of its shards is there" for file in stale if file not in candidates]
    choice.files = [inside(folder, file) for file in choice.files]
    left_out = _left_out(folder, choice.files)
    if left_out:
        taken = candidates[0].name if candidates else _pattern(choice.files[0])
        choice.warnings.append(f"{folder}: took {taken} and left out {', '.join(left_out)}; name a file to choose")
    return choice


def named(folder: Place) -> list[Place]:
    """The files whose names say that they are an adapter, a model or the index of one, the one to take first."""
    known = [folder / name for name in (*ADAPTER_FILES, *_FULL_FILES) if (folder / name).is_file()]
    if known:
        return known
    beside = folder.items()
    return [file for kind in ("safetensors", "bin") for file in beside if file.name.endswith(f".{kind}.index.json")]


def weight_files(folder: Place) -> list[Place]:
    """What may be weights by its suffix, and is not known to be something else."""
    files = [file for file in folder.items() if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
    return [file for file in files if not file.name.startswith(_NOT_WEIGHTS) and not training_state.what(file.name)]


def _left_out(folder: Place, taken: list[Place]) -> list[str]:
    """Weights in the folder that were not taken, shards of one model under one name."""
    others = [file for file in weight_files(folder) if file not in taken]
    others += [file for file in folder.items() if file.suffix in _OTHER_FRAMEWORKS and file.is_file()]
    return sorted({_pattern(file) for file in others})


def _pattern(file: Place) -> str:
    return _SHARD.sub("-*-of-*", file.name)


def _unnamed(folder: Place) -> list[Place]:
    """The one file of weights, or the numbered shards of one model, whatever their name."""
    files = weight_files(folder)
    for suffix in (".safetensors", ".gguf"):
        files = [file for file in files if file.suffix == suffix] or files
    models = {_pattern(file) for file in files}
    if not files:
        raise NotFoundError(f"{folder} holds no weights ({', '.join(WEIGHT_SUFFIXES)}){_hint(folder)}")
    if len(models) == 1 and (len(files) == 1 or _SHARD.search(files[0].name)):
        _check_shards(folder, files)
        return files
    plain = {name for name in models if not re.search(r"\.(?:fp16|bf16|fp32|non_ema|ema)\.", name)}
    if len(plain) == 1 and len(models) > 1:
        return [file for file in files if _pattern(file) in plain]
    raise SourceError(f"{folder} holds {len(files)} weight files: {', '.join(f.name for f in files[:8])}; name one")


def _check_shards(folder: Place, files: list[Place]) -> None:
    """Refuse numbered shards of which one is not there: without an index nobody knows what it held."""
    numbers = [match for file in files if (match := _SHARD.search(file.name))]
    count = max((int(match[2]) for match in numbers), default=0)
    lost = sorted(set(range(1, min(count, _MAX_SHARDS) + 1)) - {int(match[1]) for match in numbers})
    if lost:
        raise NotFoundError(
            f"{folder} holds {len(files)} of {count} shards: number {lost[0]} of {_pattern(files[0])} is missing; "
            "download it again, or name one shard to see what is in it"
        )


def _hint(folder: Place) -> str:
    """What a folder without weights is, and where weights may be; "" where nothing says."""
    names = [item.name for item in folder.items()]
    if "run.json" in names and {"spectra", "similarity"} & set(names):
        return "; it holds stored results: spectra plot and spectra similarity take them, load(…) in Python"
    if "run.json" in names and {"checkpoints", "pairs"} & set(names):
        return "; it holds stored results of a series or of pairs: spectra plot and spectra report take them"
    name, what = training_state.among(names)
    if name == dcp.METADATA:
        return (
            f"; its {name} lists a distributed checkpoint, and no piece of it (.distcp) is there: copy them beside it"
        )
    if name:
        return f"; its {name} is {what}"
    if "zero_to_fp32.py" in names:
        return f"; it is the folder of a DeepSpeed training state: {training_state.ZERO}"
    if any(name.endswith(_OTHER_FRAMEWORKS) for name in names):
        return "; only files of other frameworks: save the model as safetensors"
    lost = snapshots.why_no_weights(folder)
    if lost:
        return lost
    inner = [item.name for item in folder.items() if item.is_folder()][:8]
    return f"; it has the folders {', '.join(inner)}: did you mean one of them?" if inner else ""


def _is_stale(folder: Place, index: Place) -> bool:
    """Whether an index is left over from a save in shards that are gone."""
    weight_map = read_json(inside(folder, index)).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    return bool(shards) and not any((folder / str(shard)).is_file() for shard in shards)


def _shards(folder: Place, index: Place) -> Choice:
    weight_map = read_json(inside(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{index} has no weight_map of names to files; download it again")
    names = sorted(set(weight_map.values()))
    for shard in names:
        path = PureWindowsPath(shard)  # knows both separators and drives, whatever this machine is
        if path.anchor or ".." in path.parts or "\0" in shard:
            raise SourceError(f"{index} points outside its folder: {shard!r}; nothing was read")
    missing = {shard for shard in names if not (folder / shard).is_file()}
    if len(missing) == len(names):
        hint = snapshots.why_no_weights(folder) or "; download them"
        elsewhere = folder.storage.local_path(folder.path) is None
        hint = f": {_why_missing(folder / names[0])}" if elsewhere else hint
        raise NotFoundError(f"{index} names {len(names)} shards and none of them is there{hint}")
    why = {shard: _why_missing(folder / shard) for shard in missing}
    broken = {name: why[shard] for name, shard in weight_map.items() if shard in missing}
    return Choice([folder / shard for shard in names if shard not in missing], weight_map, broken, home=folder)


def _why_missing(file: Place) -> str:
    """Why a file is not there, in its server's words where it is elsewhere."""
    try:
        if file.storage.local_path(file.path) is None:
            file.stamp()
    except SourceError as problem:
        return str(problem)
    return f"{file} is missing; download it again"


def inside(folder: Place, file: Place) -> Place:
    """The file, unless a link takes it out of the folder.

    Raises:
        SourceError: it does.
    """
    target = folder.storage.leads_outside(file.path, folder.path)
    if target is not None:
        raise SourceError(f"{file} is a link that leaves its folder ({target}); pass the target's own path")
    return file


def read_json(file: Place) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: it is not JSON, not an object, or absurdly large.
    """
    size, _ = file.stamp()
    if size > limits.JSON:
        raise SourceError(f"{file} is larger than {limits.JSON} bytes; that is no config")
    try:
        content = json.loads(file.read(0, size).decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise SourceError(f"{file} is not readable JSON ({problem}); download or save it again") from None
    if not isinstance(content, dict):
        raise SourceError(f"{file} holds a JSON {type(content).__name__}, not an object")
    return content
