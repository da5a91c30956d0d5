"""Folders of torch.distributed.checkpoint (DCP): `.metadata` lists the tensors, `__r_i.distcp` hold pieces of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import islice

from spectra.errors import SourceError, escaped
from spectra.files.dcp_list import Listed, Piece, listed
from spectra.files.header import Header
from spectra.files.storage import Place
from spectra.files.tensors import TensorRef

METADATA = ".metadata"
PIECES = re.compile(r".*\.distcp")
_MODEL = ("model", "state_dict", "model_state_dict", "module", "app")  # what wraps the weights in a training state
_STATE = re.compile(r"(?:^|_)(?:optim|sched|rng|dataloader|train_state|param_groups)")


def read_header(folder: Place) -> tuple[Header, list[str]]:
    """The model's tensors, without what wraps them and without the optimizer's; and what was left out.

    Raises:
        SourceError: `.metadata` is damaged, or lists no weights.
    """
    file = folder / METADATA
    stamp = file.stamp()
    entries = listed(file, stamp)
    sizes = {item.name: item.stamp()[0] for item in folder.items() if PIECES.fullmatch(item.name) and item.is_file()}
    tensors: dict[str, TensorRef] = {}
    broken: dict[str, str] = {}
    weights, left_out = _weights(file, entries)
    for name, key in weights.items():
        entry = entries[key]
        why = entry if isinstance(entry, str) else _misfit(folder, key, entry, sizes)
        if why or isinstance(entry, str):
            broken[name] = escaped(why)
        else:
            place = (file.path, key, entry.dtype, entry.shape, "dcp", stamp, file.storage)
            tensors[name] = TensorRef(*place, stored=entry.shape)
    return Header(tensors, broken), left_out


def _misfit(folder: Place, key: str, entry: Listed, sizes: Mapping[str, int]) -> str:
    """Why a tensor's pieces are not the whole of it, or are not there; "" if they are."""
    for piece in entry.pieces:
        if piece.file not in sizes:
            return f"{folder / piece.file} is missing, which holds a piece of {key}; copy all of the checkpoint"
        if piece.start + piece.length > sizes[piece.file]:
            return f"{folder / piece.file} is truncated and holds a piece of {key}; copy it again"
    if not _covers(entry.shape, entry.pieces):
        return f"the pieces of {key} in {folder} are not the whole of {list(entry.shape)}; save the checkpoint again"
    return ""


def _covers(shape: tuple[int, ...], pieces: Sequence[Piece]) -> bool:
    """Whether the pieces lie inside the tensor, nowhere on each other, and fill it."""
    for piece in pieces:
        if len(piece.offsets) != len(shape) or len(piece.sizes) != len(shape):
            return False
        if any(at + size > end for at, size, end in zip(piece.offsets, piece.sizes, shape, strict=True)):
            return False
    if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
        return False
    filled = sorted((piece for piece in pieces if math.prod(piece.sizes)), key=lambda piece: piece.offsets)
    for number, one in enumerate(filled if shape else ()):
        for other in islice(filled, number + 1, None):
            if other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            if _overlap(one, other):
                return False
    return True


def _overlap(one: Piece, other: Piece) -> bool:
    axes = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + other_size and b < a + size for a, size, b, other_size in axes)


def _weights(file: Place, entries: Mapping[str, Listed | str]) -> tuple[dict[str, str], list[str]]:
    """The weight's name → its key, for the tensors of the model; and what was left out.

    A training state nests its parts: ("model", "layers.0.weight") beside ("optimizer", "state", …).
    """
    inside: dict[str, str] = {}
    bare: dict[str, str] = {}
    for key, entry in entries.items():
        path = entry.path if isinstance(entry, Listed) else (key,)
        if any(map(_STATE.search, path[:-1])) or _STATE.match(key):
            continue
        names = list(path)
        while len(names) > 1 and names[0] in _MODEL:
            names.pop(0)
        group, name = inside if len(names) < len(path) else bare, ".".join(names)
        if name in group:
            raise SourceError(f"{file.parent} holds {name} as {group[name]} and as {key}; save one model in it")
        group[name] = key
    if not inside and not bare:
        what = (
            f"{len(entries)} tensors of other kinds such as {next(iter(entries))!r}" if entries else "no tensor at all"
        )
        raise SourceError(f"{file.parent} holds no weights, but {what}; name the folder of the model's state")
    if not inside or not bare:
        return inside or bare, []
    return inside, [f"{file.parent}: took the model's tensors and left out {len(bare)} such as {next(iter(bare))}"]
