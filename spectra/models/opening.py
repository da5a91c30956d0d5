"""A model at a path, where what lies there are parts of it or has names of its own: Meta's consolidated files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

from spectra.errors import SourceError
from spectra.files import hub
from spectra.files.choice import inside, read_json
from spectra.files.folder import Folder, open_folder, read_header
from spectra.files.storage import Place
from spectra.models import in_memory, meta_names
from spectra.models.in_memory import Model

Openable: TypeAlias = "str | Path | Place | Model"

_PART = re.compile(r"consolidated\.\d\d\.(?:pth|pt|bin|safetensors)")
_PARAMS = "params.json"
_FULL = re.compile(r"(?:model|pytorch_model|adapter_model|adapter_config|adapters)\b.*\.(?:safetensors|bin|json)")


def open_any(model: Openable, *, as_base: bool = False) -> Folder:
    """What a path, hub id or alias leads to, or what a module or state dict in memory holds.

    Args:
        model: one of these.
        as_base: of a module with adapters, give the weights under them.

    Raises:
        NotFoundError: a path, id or alias leads nowhere.
        SourceError: a file is broken, or the model in memory cannot be read as it is.
    """
    if isinstance(model, str | Path | Place):
        return open_model(hub.resolve(model))
    return in_memory.open_in_memory(model, as_base=as_base)


def open_model(path: Place | str | Path) -> Folder:
    """The headers of the weights at a path, as `open_folder`; the parts of a tensor-parallel model as the whole.

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
    return open_folder(place)


def _of_meta(place: Place, home: Place, parts: list[str]) -> Folder:
    """Meta's files as one folder, under Meta's names, with `params.json` as the config."""
    params = read_json(inside(home, home / _PARAMS))
    headers = [read_header(inside(home, home / name)) for name in parts]
    tensors, refused = meta_names.joined(params, [header.tensors for header in headers])
    broken = {name: why for header in headers for name, why in header.broken.items()}
    return Folder(str(place), tensors, refused | broken, config=params)


def in_the_same_names(tuned: Folder, base: Folder) -> tuple[Folder, Folder]:
    """Both sides, the one with Meta's names under transformers' where the other has those.

    Raises:
        SourceError: `params.json` does not say what turning the rows of q and k takes.
    """
    metas = [meta_names.is_meta(folder) for folder in (tuned, base)]
    if metas == [True, False]:
        return meta_names.as_transformers(tuned), base
    if metas == [False, True]:
        return tuned, meta_names.as_transformers(base)
    return tuned, base
