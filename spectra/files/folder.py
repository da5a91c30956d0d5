"""What lies at a place: the tensors of its weight files by name, unread, and the configs beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import NotFoundError, SourceError
from spectra.files import ggml, gguf_file, gguf_names, quantised, safetensors_file
from spectra.files.choice import FULL_NAMES, PIPELINE, WEIGHT_SUFFIXES, Choice, choose, inside, read_json
from spectra.files.header import Header
from spectra.files.memory import CONTAINER, Memory
from spectra.files.storage import Place
from spectra.files.tensors import WHOLE, TensorRef
from spectra.naming import is_factor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Folder:
    """The tensors at a path, unread.

    Attributes:
        path: what was opened, a folder or one file, as messages call it.
        tensors: name → reference; fp8 weights with their scales attached, GGUF under transformers' names.
        broken: name → why it cannot be read.
        config: the model's `config.json`, or what a GGUF file's metadata amount to, or {}.
        adapter_config: the adapter's `adapter_config.json`, or None.
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
        """The tensors' names, each between two line breaks: one text to search for a piece of any of them."""
        return "\n".join(["", *self.tensors, ""])

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
    place = Place.of(path)
    is_folder = place.is_folder()
    if is_folder and (place / PIPELINE).is_file():
        return _pipeline(place)
    choice, home = (choose(place), place) if is_folder else (Choice([place]), place.parent)
    read = _read_all(choice)
    # A config of an adapter beside a model's own files is a leftover; beside any other file it is that file's.
    beside_model = any(file.name.startswith(FULL_NAMES) for file in choice.files)
    config = _beside(home, "config.json")
    is_adapter = not beside_model or any(map(_of_an_adapter, read.tensors))
    adapter_config = _beside(home, "adapter_config.json") if is_adapter else None
    folder = replace(
        read,
        path=str(place),
        config=read.config or config or {},
        adapter_config=adapter_config,
        warnings=(*choice.warnings, *read.warnings),
    )
    return folder if folder.is_adapter else decoded(folder)


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


def _of_an_adapter(name: str) -> bool:
    """Whether only an adapted model has such a tensor: then a config beside it is the adapter's."""
    return name.startswith("base_model.model.") or ".base_layer." in name or is_factor(name)


def _beside(home: Place, name: str) -> dict[str, Any] | None:
    """A config beside the weights, or None."""
    return read_json(inside(home, home / name)) if (home / name).is_file() else None


def decoded(folder: Folder) -> Folder:
    """The same folder with quantised weights as what their codes stand for."""
    found = quantised.decode(folder.tensors, folder.config, folder.broken)
    return replace(
        folder,
        tensors=found.tensors,
        broken=found.broken,
        packed=found.packed,
        warnings=(*folder.warnings, *found.warnings),
    )


def _read_all(choice: Choice) -> Folder:
    """The headers of all files, merged; a broken shard costs its own tensors only."""
    if choice.files[0].suffix == ".gguf":
        return _gguf(choice.files)
    headers: list[Header] = []
    lost: dict[str, str] = {}
    for file in choice.files:
        try:
            headers.append(read_header(file))
        except SourceError as problem:
            if len(choice.files) == 1:
                raise
            lost[file.name] = str(problem)
    whole = Header.merged(headers)
    broken = whole.broken | _not_there(choice, whole, lost)
    broken = {name: why for name, why in broken.items() if name not in whole.tensors}
    return Folder(str(choice.files[0]), whole.tensors, broken, metadata=whole.metadata, warnings=tuple(lost.values()))


def _not_there(choice: Choice, whole: Header, lost: dict[str, str]) -> dict[str, str]:
    """The tensors that the index names and no file holds → why."""
    missing = {}
    for name, shard in choice.expected.items():
        if name not in whole.tensors and name not in whole.broken:
            why = lost.get(shard.rpartition("/")[2]) or f"{shard} does not hold it; download the model again"
            missing[name] = choice.broken.get(name, why)
    return missing


def _gguf(files: list[Place]) -> Folder:
    """One GGUF file, or the parts that llama.cpp split it into, of which the first has the metadata."""
    named = gguf_names.named(Header.merged(map(gguf_file.read_header, files)), str(files[0]))
    coded = sorted({ref.dtype for ref in named.tensors.values() if ref.dtype not in ggml.PLAIN})
    said = f"{files[0]}: weights are quantised ({', '.join(coded)}), so ΔW includes what quantisation rounded away"
    warnings = (*named.warnings, said) if coded else named.warnings
    return Folder(str(files[0]), named.tensors, named.broken, named.config, warnings=warnings)


def _pipeline(place: Place) -> Folder:
    """A diffusers pipeline: every component's tensors under the component's name."""
    whole = Folder(str(place), {})
    for component, entry in read_json(inside(place, place / PIPELINE)).items():
        if not isinstance(entry, list) or "/" in component or component in ("", ".", ".."):
            continue
        part = place / component
        if not part.is_folder():
            continue
        try:
            whole = _joined(whole, component, open_folder(inside(place, part)))
        except NotFoundError:
            continue  # tokenizers, schedulers and feature extractors have no weights
        except SourceError as problem:
            whole = replace(whole, warnings=(*whole.warnings, f"{component} was left out: {problem}"))
    if not whole.tensors:
        raise NotFoundError(f"{place} is a diffusers pipeline without readable weights: {'; '.join(whole.warnings)}")
    return whole


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


def read_header(file: Place) -> Header:
    """The header of one file of safetensors or torch, by its suffix.

    Raises:
        NotFoundError: there is no such file.
        SourceError: its kind is not known, or it is broken.
    """
    if not file.is_file():
        raise NotFoundError(f"{file} does not exist; the download may be incomplete")
    if file.suffix == ".safetensors":
        return safetensors_file.read_header(file)
    if file.suffix in WEIGHT_SUFFIXES:
        from spectra.files import torch_file  # needs torch, which the other headers do without

        return torch_file.read_header(file)
    raise SourceError(f"{file} is not a weights file: known suffixes are {', '.join(WEIGHT_SUFFIXES)}")
