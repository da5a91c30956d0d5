"""The weights that an extraction is about: what sources hold, as the base has it, and what no LoRA can carry."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from spectra import naming
from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import Source
from spectra.errors import SelectionError
from spectra.extraction import experts
from spectra.extraction.modules import Architecture, Module, NotCarriedError, base_of_whole
from spectra.extraction.weights import Place, weighted, whole
from spectra.files.folder import Folder
from spectra.models import tied

CHECKPOINT = "checkpoint"  # the kind of source whose file is a whole model
_PART = re.compile(r"q|k|v|o|gate|up|down|\d+")  # of a fused weight, or the number of an expert


@dataclass(frozen=True)
class Block:
    """The update that one pair of factors stands for: a weight's, or one expert's of a stack.

    Attributes:
        delta: the update.
        pieces: what it was made of, and where each lies in it.
    """

    delta: WeightDelta
    pieces: tuple[tuple[WeightDelta, Place], ...]


@dataclass(frozen=True)
class Weight:
    """One weight that gets a LoRA: a row of the table.

    Attributes:
        name: its name in the base; of experts, that of their stack in memory.
        module: where the LoRA goes.
        blocks: the update, or one for each expert.
        note: what the update stands for, where that is not simply tuned − base, and what to know of its LoRA.
    """

    name: str
    module: Module
    blocks: tuple[Block, ...]
    note: str = ""


@dataclass
class Gathered:
    """What there is to extract.

    Attributes:
        weights: what a LoRA can hold.
        not_carried: name → why no LoRA holds it.
        undone: names among them of matrices that should have been done and could not be read.
    """

    weights: list[Weight] = field(default_factory=list)
    not_carried: dict[str, str] = field(default_factory=dict)
    undone: list[str] = field(default_factory=list)


def gather(sources: Sequence[Source], factors: Sequence[float], base: Folder | None) -> Gathered:
    """The weights of Σ factor·source, in the order of the first source that has them.

    Args:
        sources: updates of one base.
        factors: what each is multiplied by.
        base: the base, opened; None where no base is known.

    Raises:
        SelectionError: the sources are of different bases.
    """
    bases = {source.base for source in sources if source.base}
    if len(bases) > 1:
        raise SelectionError(f"updates of different bases cannot be added: {' and '.join(sorted(bases))}")
    gathered = Gathered()
    members: dict[tuple[str, int], dict[int, list[WeightDelta]]] = {}
    config = base.config if base else {}
    for place, source in enumerate(sources):
        for delta in source:
            if delta.recipe is None:
                gathered.not_carried[delta.name] = f"{delta.status}: {delta.reason}"
                gathered.undone.append(delta.name)
                continue
            expert = experts.expert_of(config, delta)
            key = (expert.stack, expert.index) if expert else (naming.split_parts(delta.name)[0], 0)
            members.setdefault(key, {}).setdefault(place, []).append(delta)
    architecture = Architecture(config, tuple(base.tensors) if base else ())
    counts = experts.counts(config, base.tensors) if base else {}
    adapters = {place for place, source in enumerate(sources) if source.kind != CHECKPOINT}
    by_name: dict[str, dict[int, dict[int, list[WeightDelta]]]] = {}
    for (name, index), by_source in members.items():
        by_name.setdefault(name, {})[index] = by_source
    for name, blocks in by_name.items():
        try:
            gathered.weights.append(_weight(name, blocks, factors, architecture, adapters, counts.get(name)))
        except NotCarriedError as why:
            gathered.not_carried[name] = str(why)
    return gathered


def _weight(
    name: str,
    members: Mapping[int, Mapping[int, Sequence[WeightDelta]]],
    factors: Sequence[float],
    architecture: Architecture,
    adapters: Collection[int],
    count: int | None,
) -> Weight:
    """One weight from block → source → updates."""
    by_place = [item for by_source in members.values() for item in by_source.items()]
    every = [delta for _, deltas in by_place for delta in deltas]
    stacked = experts.expert_of(architecture.config, every[0])
    if stacked is None:
        trained = [delta for place, deltas in by_place if place in adapters for delta in deltas]
        module = architecture.module(name, every, trained)
        return Weight(
            name, module, (_block(name, members[0], factors, architecture),), _note(name, every, architecture)
        )
    if count is None or len(members) < count:
        raise NotCarriedError(
            f"{len(members)} of {count or 'an unknown number of'} experts have an update that is known"
        )
    module = Module(
        stacked.owner,
        "experts",
        transposed=experts.is_crossed(architecture.config, name),
        parameter=stacked.parameter,
    )
    blocks = [_block(f"{name}[{index}]", members[index], factors, architecture) for index in sorted(members)]
    if len({block.delta.shape for block in blocks}) > 1:
        raise NotCarriedError("its experts differ in shape")
    return Weight(name, module, tuple(blocks), _note(name, every, architecture))


def _note(name: str, deltas: Sequence[WeightDelta], architecture: Architecture) -> str:
    notes = dict.fromkeys(delta.note for delta in deltas if delta.note)
    if tied.is_embedding(name) and tied.ties(architecture.config):
        notes["the output head is tied to it: PEFT changes that, too, once the adapter is merged"] = None
    return "; ".join(notes)


def _block(
    name: str, by_source: Mapping[int, Sequence[WeightDelta]], factors: Sequence[float], architecture: Architecture
) -> Block:
    updates: list[tuple[float, WeightDelta]] = []
    pieces: list[tuple[WeightDelta, Place]] = []
    for place, deltas in by_source.items():
        shape, places = _places(architecture, deltas)
        updates.append((factors[place], whole(name, shape, deltas, places)))
        pieces += zip(deltas, places, strict=True)
    shapes = {delta.shape for _, delta in updates}
    if len(shapes) > 1:
        raise NotCarriedError(f"the updates to add are of shapes {' and '.join(map(str, sorted(shapes)))}")
    return Block(weighted(name, updates), tuple(pieces))


def _places(architecture: Architecture, deltas: Sequence[WeightDelta]) -> tuple[tuple[int, int], list[Place]]:
    """The shape of the whole weight, and where each of one source's updates lies in it."""
    first = deltas[0]
    expert = experts.expert_of(architecture.config, first)
    if expert is not None:
        places = [
            experts.place_of(architecture.config, matrix, delta.shape)
            for delta in deltas
            if (matrix := experts.expert_of(architecture.config, delta))
        ]
        return places[0][0], [place for _, place in places]
    if first.base is None and any(_PART.fullmatch(part) for part in naming.split_parts(first.name)[1]):
        raise NotCarriedError("where this part lies in the whole weight only the base tells: pass it (--base)")
    shape = first.shape if first.base is None else base_of_whole(first.base).shape
    if sum(delta.shape[0] for delta in deltas) > shape[0] or any(delta.shape[1:] != shape[1:] for delta in deltas):
        raise NotCarriedError(f"{len(deltas)} updates of one weight: choose one, such as a head (--heads)")
    return (shape[0], shape[1]), [delta.base for delta in deltas]
