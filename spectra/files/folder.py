"""What lies at a place: the tensors of its weight files by name, unread, and the configs beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import NotFoundError, SourceError
from spectra.files import (
    dcp,
    ggml,
    gguf_file,
    gguf_names,
    limits,
    quantised,
    rank_files,
    snapshots,
    training_state,
)
from spectra.files.choice import (
    FULL_NAMES,
    PIPELINE,
    Choice,
    choose,
    inside,
    named,
    read_json,
    weight_files,
)
from spectra.files.header import Header
from spectra.files.headers import read_headers
from spectra.files.memory import CONTAINER, Memory
from spectra.files.storage import Place
from spectra.files.tensors import WHOLE, TensorRef
from spectra.naming import is_factor

if TYPE_CHECKING:
    from torch import Tensor

# What diffusers calls the components that have weights, in a folder each.
_COMPONENT = re.compile(
    r"(?:unet|transformer|prior|controlnet|vae|vqvae|movq|text_encoder|image_encoder|safety_checker)(?:_\d+)?"
)
_SAVE_AGAIN = "download the model again, or save it again"


@dataclass(frozen=True)
class Folder:
    """The tensors at a path, unread.

    Attributes:
        path: what was opened, a folder or one file, as messages call it.
        tensors: name → reference; fp8 weights with their scales attached, GGUF under transformers' names.
        broken: name → why it cannot be read.
        config: the model's `config.json`, or what a GGUF file's metadata amount to, or {}.
        adapter_config: the adapter's `adapter_config.json`, or the metadata of an adapter in a GGUF file, or None.
        metadata: strings from the files' headers; where a tensor is stored once under two names, the
            second name → the first.
        warnings: what was chosen where there was a choice.
        packed: name → why its quantised codes are not decoded.
        components: the config of each component of a diffusers pipeline; its names start with the component.
    """

    path: str
    tensors: dict[str, TensorRef]
    broken: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    adapter_config: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    packed: dict[str, str] = field(default_factory=dict)
    components: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether the files or the config beside them say that this is an adapter."""
        return self.adapter_config is not None

    @property
    def unusable(self) -> dict[str, str]:
        """Every name that is there and gives no numbers: broken or packed → why."""
        return self.broken | self.packed

    @property
    def same(self) -> dict[str, str]:
        """Names that are stored once: second name → first name, which is the one to read."""
        return {
            name: first
            for name, first in self.metadata.items()
            if first in self.tensors and (name not in self.tensors or self.tensors[name].container in WHOLE)
        }

    @cached_property
    def listing(self) -> str:
        """The tensors' names, broken ones, too, each between two line breaks: one text to search for a piece of any."""
        return "\n".join(["", *self.tensors, *(name for name in self.broken if name not in self.tensors), ""])

    def config_of(self, name: str) -> dict[str, Any]:
        """The config that a weight belongs to: its component's in a pipeline, else the model's."""
        return self.components.get(name.partition(".")[0], self.config)


def open_folder(path: Place | str | Path) -> Folder:
    """Read the headers of the weights at a place, or at a path of this machine.

    Raises:
        NotFoundError: there are no weights.
        SourceError: an index, a config or the only weights file is broken.
        MissingExtraError: a GGUF file is quantised and the `gguf` package is not installed.
    """
    return _opened(Place.of(path), 0)


def _opened(place: Place, depth: int) -> Folder:
    """As `open_folder`, so many folders within the one that was named."""
    if depth > limits.FOLDERS:
        raise SourceError(f"{place} lies in folders that contain one another; remove the links, or name one component")
    is_folder = place.is_folder()
    if is_folder and (place / PIPELINE).is_file():
        return _pipeline(place, _indexed(place), depth)
    in_parts = _in_parts(place)
    if in_parts is not None:
        return _with_configs(in_parts, _homes_of_parts(place if is_folder else place.parent), beside_model=True)
    components = _side_by_side(place) if is_folder else []
    if components:
        return _pipeline(place, components, depth)
    choice, home = (choose(place), place) if is_folder else (Choice([place]), place.parent)
    read = _read_all(choice)
    read = replace(read, path=str(place), warnings=(*choice.warnings, *read.warnings))
    beside_model = any(file.name.startswith(FULL_NAMES) for file in choice.files)
    return _with_configs(read, [home], beside_model=beside_model)


def _in_parts(place: Place) -> Folder | None:
    """A model that training left in parts of every weight; None for anything else."""
    alone = rank_files.RANK_FILE.fullmatch(place.name)
    if alone and int(alone[1]) == 1 and place.is_file():
        return _of_header(place, rank_files.read_header([place]))
    if not place.is_folder() or named(place):
        return None
    items = place.items()
    ranks = [inside(place, item) for item in items if rank_files.RANK_FILE.fullmatch(item.name)]
    if ranks:
        others = [item.name for item in weight_files(place)]
        said = (
            [f"{place}: took the rank files and left out {', '.join(others)}; name a file to choose"] if others else []
        )
        return _of_header(place, rank_files.read_header(ranks), said)
    if not any(item.name == dcp.METADATA for item in items) or not any(dcp.PIECES.fullmatch(it.name) for it in items):
        return None
    inside(place, place / dcp.METADATA)
    header, left_out = dcp.read_header(place)
    return _of_header(place, header, left_out)


def _homes_of_parts(home: Place) -> list[Place]:
    """Where trainers put the configs of a model that they leave in parts: verl in two folders, accelerate above."""
    above = [home.parent] if home.name.startswith("pytorch_model_fsdp") else []
    return [home, home / "huggingface", home / "lora_adapter", *above]


def _of_header(place: Place, header: Header, warnings: Sequence[str] = ()) -> Folder:
    whole = Header.merged([header])
    return Folder(str(place), whole.tensors, whole.broken, warnings=tuple(warnings))


def _with_configs(read: Folder, homes: Sequence[Place], *, beside_model: bool) -> Folder:
    """The folder with the configs from the first of the places that has them, and its codes decoded."""
    read = _without_empty(read)
    # A config of an adapter beside a model's own files is a leftover; beside any other file it is that file's.
    is_adapter = not beside_model or any(map(_of_an_adapter, (*read.tensors, *read.broken)))
    adapter_config = read.adapter_config
    if adapter_config is None and is_adapter:
        adapter_config = _first(homes, "adapter_config.json")
    config = read.config or _first(homes, "config.json") or {}
    folder = replace(read, config=config, adapter_config=adapter_config)
    return folder if folder.is_adapter else decoded(_with_settings(folder, homes[0]))


def open_tensors(
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    config: Mapping[str, Any] | None = None,
    adapter_config: Mapping[str, Any] | None = None,
) -> Folder:
    """Tensors in memory as `open_folder` gives those of files.

    Args:
        tensors: name → tensor, as a state dict has them.
        where: what messages call them.
        config: the model's config.
        adapter_config: what `adapter_config.json` would say; None for full weights.

    Raises:
        SourceError: there are none.
    """
    from spectra.files.torch_file import header_of

    if not tensors:
        raise SourceError(f"{where} holds no tensors")
    header = header_of(tensors, Place(Memory.of(tensors), where), (0, 0), CONTAINER)
    adapter = None if adapter_config is None else dict(adapter_config)
    folder = Folder(where, header.tensors, header.broken, dict(config or {}), adapter, header.metadata)
    return folder if folder.is_adapter else decoded(folder)


def _first(homes: Sequence[Place], name: str) -> dict[str, Any] | None:
    return next((content for home in homes if (content := _beside(home, name)) is not None), None)


def _without_empty(read: Folder) -> Folder:
    """Take out what DeepSpeed's ZeRO-3 leaves of a weight that is saved without being gathered: a tensor of size 0."""
    empty = [name for name, ref in read.tensors.items() if ref.shape == (0,) and _is_parameter(name)]
    if not empty:
        return read
    what = f"it has size 0 in {read.path}, as DeepSpeed ZeRO-3 saves a weight that it did not gather"
    why = f"{what}: {training_state.ZERO}"
    return replace(
        read,
        tensors={name: ref for name, ref in read.tensors.items() if name not in empty},
        broken=read.broken | dict.fromkeys(empty, why),
        warnings=(*read.warnings, f"{len(empty)} tensors such as {empty[0]}: {why}"),
    )


def _is_parameter(name: str) -> bool:
    return name.endswith((".weight", ".bias")) or is_factor(name)


def _of_an_adapter(name: str) -> bool:
    """Whether only an adapted model has such a tensor: then a config beside it is the adapter's."""
    return name.startswith("base_model.model.") or ".base_layer." in name or is_factor(name)


def _beside(home: Place, name: str) -> dict[str, Any] | None:
    """A config beside the weights, or None.

    Raises:
        SourceError: it is not JSON, or a link to a file that is not there: then nobody knows what it would say.
    """
    if (home / name).is_file():
        return read_json(inside(home, home / name))
    on_this_machine = home.storage.local_path(home.path) is not None  # others have no links, and servers list nothing
    if on_this_machine and home.is_folder() and name in snapshots.dangling(home):
        raise SourceError(f"{home / name} is a link to a file that is not there; download or copy it again")
    return None


def _with_settings(folder: Folder, home: Place) -> Folder:
    """What lies in a file of its own about codes that the config says nothing of."""
    silent = not any(key in folder.config for key in ("quantization_config", "compression_config"))
    if silent and any(name.endswith(".qweight") for name in folder.tensors):
        for said in filter(None, (_beside(home, name) for name in quantised.SETTINGS_FILES)):
            return replace(folder, config=folder.config | {"quantization_config": quantised.todays_settings(said)})
    return folder


def decoded(folder: Folder) -> Folder:
    """The same folder with quantised weights as what their codes stand for."""
    plain = quantised.decode(folder.tensors, folder.config, folder.broken)
    return replace(
        folder,
        tensors=plain.tensors,
        broken=plain.broken,
        packed=plain.packed,
        warnings=(*folder.warnings, *plain.warnings),
    )


def _read_all(choice: Choice) -> Folder:
    """The headers of all files, merged; a broken shard costs its own tensors only."""
    if _is_gguf(choice.files[0]):
        return _gguf(choice.files)
    found = read_headers(choice.files)
    headers = [header for header in found if isinstance(header, Header)]
    lost = {file.name: str(why) for file, why in zip(choice.files, found, strict=True) if isinstance(why, SourceError)}
    if lost and len(choice.files) == 1:
        raise next(why for why in found if isinstance(why, SourceError))
    whole = Header.merged(headers)
    astray = _astray(choice, whole)
    broken = whole.broken | _not_there(choice, whole, lost)
    broken = {name: why for name, why in broken.items() if name not in whole.tensors} | astray
    tensors = {name: ref for name, ref in whole.tensors.items() if name not in astray}
    warnings = (*whole.warnings, *lost.values())
    return Folder(str(choice.files[0]), tensors, broken, metadata=whole.metadata, warnings=warnings)


def _astray(choice: Choice, whole: Header) -> dict[str, str]:
    """The tensors that lie in another file than the index says → why they are not taken: one of the two is stale."""
    astray = {}
    for name, shard in choice.expected.items():
        ref = whole.tensors.get(name)
        if ref is not None and choice.home is not None and ref.file != choice.home / shard:
            astray[name] = (
                f"the index says that {shard} holds {name}, and {ref.path} does: index and shards are not of "
                f"one save; {_SAVE_AGAIN}"
            )
    return astray


def _not_there(choice: Choice, whole: Header, lost: dict[str, str]) -> dict[str, str]:
    """The tensors that the index names and no file holds → why."""
    missing = {}
    for name, shard in choice.expected.items():
        if name not in whole.tensors and name not in whole.broken:
            why = f"the index says that {shard} holds {name}, and it does not; {_SAVE_AGAIN}"
            missing[name] = choice.broken.get(name) or lost.get(shard.rpartition("/")[2]) or why
    return missing


def _is_gguf(file: Place) -> bool:
    """Whether a file is one of llama.cpp's, by its suffix, or by its first bytes if it has none, as Ollama's blobs."""
    blob = not file.suffix and file.is_file()
    return file.suffix == ".gguf" or (blob and file.read(0, 4) == gguf_file.MAGIC)


def _gguf(files: list[Place]) -> Folder:
    """One GGUF file, or the parts that llama.cpp split it into, of which the first has the metadata.

    An adapter keeps llama.cpp's names: the order of its rows may take the base's number of heads to tell.
    """
    header = Header.merged(map(gguf_file.read_header, files))
    if gguf_names.is_adapter(header):
        return Folder(str(files[0]), header.tensors, header.broken, adapter_config=header.metadata)
    named = gguf_names.named(header, str(files[0]))
    coded = sorted({ref.dtype for ref in named.tensors.values() if ref.dtype not in ggml.PLAIN})
    said = f"{files[0]}: weights are quantised ({', '.join(coded)}), so ΔW includes what quantisation rounded away"
    warnings = (*named.warnings, said) if coded else named.warnings
    return Folder(str(files[0]), named.tensors, named.broken, named.config, warnings=warnings)


def _pipeline(place: Place, components: Sequence[str], depth: int) -> Folder:
    """The components of an image or video model: every one's tensors under its name."""
    whole, adapters = Folder(str(place), {}), []
    for component in components:
        part = place / component
        if not part.is_folder():
            continue
        try:
            part_of = _opened(inside(place, part), depth + 1)
        except SourceError as problem:
            # Tokenizers, schedulers and feature extractors have no weights, and a denoiser has.
            if not isinstance(problem, NotFoundError) or _COMPONENT.fullmatch(component):
                whole = replace(whole, warnings=(*whole.warnings, f"{component} was left out: {problem}"))
            continue
        adapters += [component] if part_of.is_adapter else []
        whole = _joined(whole, component, part_of)
    if adapters:
        raise SourceError(f"{place}: what lies in {' and in '.join(adapters)} is an adapter; name one of these folders")
    if not whole.tensors:
        raise NotFoundError(f"{place} is a diffusers pipeline without readable weights: {'; '.join(whole.warnings)}")
    return whole


def _indexed(place: Place) -> list[str]:
    """The components that `model_index.json` names."""
    listed = read_json(inside(place, place / PIPELINE)).items()
    return [
        name for name, entry in listed if isinstance(entry, list) and "/" not in name and name not in ("", ".", "..")
    ]


def _side_by_side(place: Place) -> list[str]:
    """Folders with weights that are called as the components of a pipeline, where the folder itself holds none."""
    if named(place) or weight_files(place):
        return []
    folders = [item for item in place.items() if _COMPONENT.fullmatch(item.name) and item.is_folder()]
    return [item.name for item in folders] if any(named(item) or weight_files(item) for item in folders) else []


def _joined(whole: Folder, component: str, part: Folder) -> Folder:
    def prefixed(entries: dict[str, Any]) -> dict[str, Any]:
        return {f"{component}.{name}": value for name, value in entries.items()}

    same = {f"{component}.{name}": f"{component}.{first}" for name, first in part.same.items()}
    return replace(
        whole,
        tensors=whole.tensors | prefixed(part.tensors),
        broken=whole.broken | prefixed(part.broken),
        packed=whole.packed | prefixed(part.packed),
        metadata=whole.metadata | same,
        components=whole.components | {component: part.config},
        warnings=(*whole.warnings, *part.warnings),
    )
