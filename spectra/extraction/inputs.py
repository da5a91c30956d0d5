"""What an extraction is given: sources, deltas or a stored run, brought to weights and where their triplets are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectra.deltas.delta import WeightDelta
from spectra.deltas.recipes import InMemory
from spectra.deltas.source import Source
from spectra.errors import SelectionError, SourceError
from spectra.extraction.gather import Gathered, gather
from spectra.extraction.left_out import LeftOut, left_out
from spectra.extraction.modules import Architecture
from spectra.extraction.triplets import Computed, Stored, Triplets
from spectra.files import hub
from spectra.files.folder import Folder
from spectra.files.memory import CONTAINER
from spectra.files.remote import is_url, model_of
from spectra.models.opening import open_model
from spectra.results import run_file
from spectra.results.collection import Spectra, load
from spectra.sources import open_source
from spectra.spectrum import Spectrum

Given = Source | Sequence[Source] | Iterable[WeightDelta] | Spectra | str | Path

_HUB_SNAPSHOT = re.compile(r".*/models--(?P<owner>.+?)--(?P<name>[^/]+)/snapshots/[^/]+/?")


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before a number is computed.

    Attributes:
        gathered: the weights, and what no LoRA can hold.
        triplets: where their spectra come from.
        left: what each source lists as not used.
        base: the base, opened, or None.
        base_model: what an adapter's config calls the base; "" where it is not known.
        all_modules: paths in memory of the base's modules, and of those that hold them.
        as_is: whether the update is that of one source, times 1.
        replication: the ranges of the base's layers that PEFT repeats before it adapts them; [] for none.
    """

    gathered: Gathered
    triplets: Triplets
    left: tuple[LeftOut, ...] = ()
    base: Folder | None = None
    base_model: str = ""
    all_modules: frozenset[str] = field(default_factory=frozenset)
    as_is: bool = True
    replication: Sequence[Any] = ()


def inputs_of(given: Given, factors: Sequence[float] | None, **compute: Any) -> Inputs:
    """Open what was given.

    Args:
        given: what `extract` takes.
        factors: what each source is multiplied by; None for 1 each.
        compute: device, executor and memory_budget, as for `decompose`.

    Raises:
        SelectionError: the factors are not one for each source, a stored run has factors, or there is nothing.
        SourceError: the files of a stored run are gone.
        StoreError: a path holds no results.
    """
    spectra = load(given) if isinstance(given, str | Path) else given if isinstance(given, Spectra) else None
    sources = [_source_of_run(spectra)] if spectra is not None else _sources(given)
    if spectra is not None and factors is not None:
        raise SelectionError("a stored run cannot be added to others: weights= goes with sources")
    factors = [1.0] * len(sources) if factors is None else list(factors)
    if len(factors) != len(sources):
        raise SelectionError(f"{len(factors)} weights for {len(sources)} updates: give each its own")
    _refuse_in_memory(sources)
    path = next((source.base for source in sources if source.base), None)
    base = open_model(hub.resolve(path)) if path else None
    architecture = Architecture(base.config if base else {}, tuple(base.tensors) if base else ())
    gathered = gather(sources, factors, base)
    blocks = [block for weight in gathered.weights for block in weight.blocks]
    tuned = [open_model(hub.resolve(source.tuned)) if source.tuned else None for source in sources]
    triplets = Stored(blocks, spectra) if spectra is not None else Computed(blocks, **compute)
    left = [
        left_out(source, folder, base, architecture)
        for source, folder in zip(sources, tuned, strict=True)
        if folder is not None
    ]
    names, modules = _base_model(path, tuned), frozenset(_modules(architecture, base))
    as_is, replication = factors == [1.0], _replication(tuned)
    return Inputs(gathered, triplets, tuple(left), base, names, modules, as_is=as_is, replication=replication)


def _replication(tuned: Sequence[Folder | None]) -> Sequence[Any]:
    """`layer_replication` of the adapters: their layers have the numbers of the model that it makes of the base."""
    replications = [
        ((folder.adapter_config if folder else None) or {}).get("layer_replication") or [] for folder in tuned
    ]
    if any(each != replications[0] for each in replications):
        raise SelectionError(
            "the updates are of models with different layer_replication, so layers of one number are not the same "
            "layer: extract each on its own"
        )
    return replications[0] if replications else []


def _refuse_in_memory(sources: Iterable[Source]) -> None:
    """Raise for a model in memory: what an adapter has to fit is the files of a base."""
    for source in sources:
        if any(ref.container == CONTAINER for delta in source for ref in delta.refs):
            raise SelectionError(
                f"extract reads the layout of files, and {source.tuned} or its base is in memory: save it and open the "
                "folder"
            )


def _sources(given: Any) -> list[Source]:
    if isinstance(given, Source):
        return [given]
    listed = list(given)
    if listed and all(isinstance(item, Source) for item in listed):
        return listed
    if not listed or not all(isinstance(item, WeightDelta) for item in listed):
        raise SelectionError("there is nothing to extract: give a source, several, deltas, or a results directory")
    return [Source("deltas", tuple(listed))]


def _source_of_run(spectra: Spectra) -> Source:
    """The updates that a run decomposed, listed again for their layout: no weight is read."""
    said = spectra.run.get("inputs", {})
    if not said.get("tuned"):
        return Source("spectra", tuple(map(_unread, spectra.without_vectors())))
    try:
        source = open_source(said["tuned"], said.get("base"), **run_file.options_of(said))
    except SourceError as problem:
        raise SourceError(f"{spectra.directory} tells of files that cannot be opened any more: {problem}") from None
    there = frozenset(source.names)
    return source.select([name for name in spectra.names if name in there])


def _unread(spectrum: Spectrum) -> WeightDelta:
    """A delta for a spectrum of which nobody knows the files: it stands for the name and shape, and is never read."""
    return WeightDelta(spectrum.name, spectrum.shape, InMemory(()), spectrum.max_rank or 0)


def _base_model(path: str | None, tuned: Iterable[Folder | None]) -> str:
    """The base as a loader should name it: a hub id where it lies in the hub's cache, a whole path on this machine."""
    if path and is_url(path):
        return model_of(path) or path
    if path:
        match = _HUB_SNAPSHOT.fullmatch(path)
        place = Path(path)
        return f"{match['owner']}/{match['name']}" if match else str(place.resolve()) if place.exists() else path
    configs = (folder.adapter_config or {} for folder in tuned if folder is not None)
    return next((str(name) for config in configs if (name := config.get("base_model_name_or_path"))), "")


def _modules(architecture: Architecture, base: Folder | None) -> Iterable[str]:
    for name in base.tensors if base else ():
        path = architecture.in_memory(name).rpartition(".")[0]
        while path:
            yield path
            path = path.rpartition(".")[0]
