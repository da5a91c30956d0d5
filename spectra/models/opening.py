"""A model at a path, where what lies there are parts of it or has names of its own: Meta's, LitGPT's, torchtune's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from spectra.errors import MissingExtraError, SourceError
from spectra.files import hub
from spectra.files.choice import inside, read_json
from spectra.files.folder import Folder, open_folder
from spectra.files.headers import read_header
from spectra.files.storage import Place
from spectra.models import in_memory, litgpt_names, meta_names, torchtune_names
from spectra.models.in_memory import Model

Openable: TypeAlias = "str | Path | Place | Folder | Model"

_PART = re.compile(r"consolidated\.\d\d\.(?:pth|pt|bin|safetensors)")
_PARAMS = "params.json"
_MAX_YAML = 2**15  # LitGPT writes one or two KiB; nested brackets take the parser seconds per 100 KiB
_FULL = re.compile(r"(?:model|pytorch_model|adapter_model|adapter_config|adapters)\b.*\.(?:safetensors|bin|json)")


def open_any(model: Openable, *, as_base: bool = False) -> Folder:
    """What a path, hub id or alias leads to, or what a module or state dict in memory holds.

    Args:
        model: one of these; what is open already is not opened again.
        as_base: of a module with adapters, give the weights under them.

    Raises:
        NotFoundError: a path, id or alias leads nowhere.
        SourceError: a file is broken, or the model in memory cannot be read as it is.
    """
    if isinstance(model, Folder):
        return model
    if isinstance(model, str | Path | Place):
        return open_model(hub.resolve(model))
    return in_memory.open_in_memory(model, as_base=as_base)


def open_model(path: Place | str | Path) -> Folder:
    """The headers of the weights at a path, as `open_folder`; the parts of a tensor-parallel model as the whole.

    What LitGPT says of its own files in YAML counts as their config.

    Raises:
        NotFoundError: there are no weights.
        SourceError: a file is broken, or is one part of a model of which the others are not there.
    """
    place = Place.of(path)
    if place.is_folder():
        names = [item.name for item in place.items()]
        parts = sorted(filter(_PART.fullmatch, names))
        if parts and _PARAMS in names and not any(map(_FULL.fullmatch, names)):
            return _of_meta(place, place, parts)
    elif _PART.fullmatch(place.name) and (place.parent / _PARAMS).is_file():
        siblings = sorted(item.name for item in place.parent.items() if _PART.fullmatch(item.name))
        if len(siblings) > 1:
            raise SourceError(
                f"{place} is one of the {len(siblings)} parts of a tensor-parallel model, and each holds a slice of "
                f"every matrix: name the folder {place.parent}"
            )
        return _of_meta(place, place.parent, [place.name])
    return _with_litgpts_configs(open_folder(place), place if place.is_folder() else place.parent)


def _with_litgpts_configs(folder: Folder, home: Place) -> Folder:
    """What lies in LitGPT's names with what it says beside it, in YAML; everything else as it is.

    Raises:
        MissingExtraError: there is YAML to read, and PyYAML is not installed.
        SourceError: it cannot be read.
    """
    if not litgpt_names.speaks(folder.tensors):
        return folder
    params = _yaml(home, "model_config.yaml")
    if params:
        folder = replace(folder, config=litgpt_names.config(params))
    if not litgpt_names.is_whole(folder) and folder.adapter_config is None:
        folder = replace(folder, adapter_config=_yaml(home, "hyperparameters.yaml"))
    return litgpt_names.in_todays_order(folder)


def _yaml(home: Place, name: str) -> dict[str, Any] | None:
    """An object from a YAML file in a folder; None where there is no file."""
    if not (home / name).is_file():
        return None
    file = inside(home, home / name)
    try:
        import yaml
    except ImportError:
        raise MissingExtraError(f"reading {file}", "litgpt") from None
    size, _ = file.stamp()
    if size > _MAX_YAML:
        raise SourceError(f"{file} is larger than {_MAX_YAML} bytes; that is no config")
    try:
        content = yaml.safe_load(file.read(0, size).decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise SourceError(f"{file} is not readable YAML ({first}); download or save it again") from None
    if not isinstance(content, dict):
        raise SourceError(f"{file} holds a YAML {type(content).__name__}, not an object")
    return {str(key): value for key, value in content.items()}


def _of_meta(place: Place, home: Place, parts: list[str]) -> Folder:
    """Meta's files as one folder, under Meta's names, with `params.json` as the config."""
    params = read_json(inside(home, home / _PARAMS))
    headers = [read_header(inside(home, home / name)) for name in parts]
    tensors, refused = meta_names.joined(params, [header.tensors for header in headers])
    broken = {name: why for header in headers for name, why in header.broken.items()}
    return Folder(str(place), tensors, refused | broken, config=params)


def in_the_same_names(tuned: Folder, base: Folder) -> tuple[Folder, Folder]:
    """Both sides, one that has names of its own under transformers' where the other does not have the same.

    Raises:
        SourceError: nothing says what cutting q, k and v apart, or turning the rows of q and k, takes.
    """
    return _translated(tuned, base), _translated(base, tuned)


def _translated(folder: Folder, other: Folder) -> Folder:
    """One side in the names of the other."""
    if meta_names.is_meta(folder):
        return folder if meta_names.is_meta(other) else meta_names.as_transformers(folder)
    if litgpt_names.is_whole(folder) and not litgpt_names.speaks(other.tensors):
        return litgpt_names.as_transformers(folder, other)
    if torchtune_names.is_whole(folder) and any(".self_attn." in name for name in other.tensors):
        return torchtune_names.as_transformers(folder, other)
    return folder
