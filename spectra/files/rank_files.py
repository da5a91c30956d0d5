"""FSDP's rank files as verl saves them, `model_world_size_4_rank_0.pt` to `_rank_3.pt`, joined to the whole weights.

Each file holds one rank's part of every DTensor. torch cuts an axis of n entries over w ranks in pieces of ⌈n/w⌉; the
last ones are smaller or empty.

Reference: verl, `verl/model_merger/fsdp_model_merger.py` for the files' names; PyTorch, `torch.distributed.tensor`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from spectra.errors import NotFoundError, SourceError
from spectra.files.header import Header
from spectra.files.storage import Place
from spectra.files.tensors import TensorRef
from spectra.files.torch_listing import Listing, Part, listed

RANK_FILE = re.compile(r"model_world_size_([1-9]\d{0,5})_rank_(\d{1,6})\.pt")
MERGER = "`python -m verl.model_merger merge --backend fsdp` makes one model of them"


def read_header(files: Iterable[Place]) -> Header:
    """The whole tensors of a model whose ranks saved a file each.

    Raises:
        NotFoundError: a rank's file is missing.
        SourceError: the files are of several saves, or one is damaged.
    """
    ranks = _by_rank(list(files))
    held = [listed(file) for file in ranks]
    flat = next(
        (name for file in held for name in file.plain if name.rpartition(".")[2].startswith("_flat_param")), None
    )
    if flat:
        raise SourceError(
            f"{ranks[0]} holds FSDP's flat parameters ({flat}), which do not say which weights lie in them: save the "
            "model with StateDictType.SHARDED_STATE_DICT or FULL_STATE_DICT"
        )
    tensors: dict[str, TensorRef] = {}
    broken: dict[str, str] = {}
    for name in dict.fromkeys(name for file in held for name in (*file.parts, *file.plain, *file.broken)):
        try:
            tensors[name] = _whole(name, ranks, held)
        except SourceError as problem:
            broken[name] = str(problem)
    if not tensors and not broken:
        raise SourceError(f"{ranks[0]} holds no tensors; is it an optimizer's state?")
    return Header(tensors, broken)


def _by_rank(files: list[Place]) -> list[Place]:
    """The files in the order of their ranks, all of them."""
    matches = {file: match for file in files if (match := RANK_FILE.fullmatch(file.name))}
    worlds = sorted({int(match[1]) for match in matches.values()})
    if len(worlds) > 1:
        raise SourceError(
            f"{files[0].parent} holds rank files of several saves, of {' and '.join(map(str, worlds))} ranks; "
            "keep those of one"
        )
    ranks = {int(match[2]): file for file, match in matches.items()}
    missing = sorted(set(range(worlds[0])) - set(ranks))
    if missing:
        few = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise NotFoundError(
            f"{files[0].parent} holds {len(ranks)} of {worlds[0]} rank files, and each has a part of every weight: "
            f"copy the missing ones here, of rank {few}"
        )
    return [ranks[rank] for rank in range(worlds[0])]


def _whole(name: str, files: list[Place], held: list[Listing]) -> TensorRef:
    """One tensor, from what every rank holds under its name.

    Raises:
        SourceError: a part is missing or cannot be read, or how they go together is not known.
    """
    for file, listing in zip(files, held, strict=True):
        if name in listing.broken:
            raise SourceError(listing.broken[name])
        if name not in listing.parts and name not in listing.plain:
            raise SourceError(f"{name} is not in {file}, and other ranks' files have it; save the model again")
    plain = next((listing.plain[name] for listing in held if name in listing.plain), None)
    if plain is None:
        return _joined(name, [listing.parts[name] for listing in held])
    if len(files) == 1 or (len(plain.shape) < 2 and all(name in listing.plain for listing in held)):
        return plain  # the one rank's, or a vector, which has no spectrum
    raise SourceError(
        f"{name} in {plain.path} is a plain tensor, which does not say whether every rank has all of it or a part; "
        f"{MERGER}"
    )


def _joined(name: str, parts: list[Part]) -> TensorRef:
    first = parts[0]
    where = f"{name} in {first.local.path}"
    if any((part.shape, part.placements) != (first.shape, first.placements) for part in parts):
        raise SourceError(f"{where} has another shape or placement on another rank; the files are not of one save")
    said = ", ".join(map(str, first.placements))
    cut = [place for place, placement in enumerate(first.placements) if placement.kind != "Replicate"]
    if any(first.placements[place].kind != "Shard" for place in cut):
        raise SourceError(f"{where} is placed ({said}) over the ranks; only Shard and Replicate are joined: {MERGER}")
    if len(cut) > 1:
        raise SourceError(f"{where} is cut along two axes of the ranks ({said}), which is not joined: {MERGER}")
    if not cut:
        return _checked(where, first.local, first.shape)
    axis = first.placements[cut[0]].dim
    if axis is None or not -len(first.shape) <= axis < len(first.shape):
        raise SourceError(f"{where} has {len(first.shape)} axes and is placed {said}; save the model again")
    pieces: dict[int, TensorRef] = {}
    for part in parts:
        pieces.setdefault(part.coordinate[cut[0]], part.local)
    return _side_by_side(where, pieces, first.shape, axis % len(first.shape))


def _side_by_side(where: str, pieces: dict[int, TensorRef], shape: tuple[int, ...], axis: int) -> TensorRef:
    """The pieces one after the other along an axis, each as large as torch cuts it."""
    count = max(pieces) + 1
    if count > len(pieces):
        raise SourceError(f"{where} is cut in {count} pieces, and {len(pieces)} are here; copy all rank files here")
    step = -(-shape[axis] // count)
    refs = []
    for place in range(count):
        size = max(min(step, shape[axis] - place * step), 0)
        if size:
            refs.append(_checked(where, pieces[place], (*shape[:axis], size, *shape[axis + 1 :])))
        elif pieces[place].numel:
            raise SourceError(f"{where} has a piece too many; the files are not of one save")
    if len(refs) < 2:
        return refs[0] if refs else pieces[0]
    return TensorRef.joined(refs, axis)


def _checked(where: str, ref: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    if ref.shape != shape:
        raise SourceError(f"{where}: {ref.path} holds {list(ref.shape)} of it and should hold {list(shape)}")
    return ref
