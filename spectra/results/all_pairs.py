"""`compare_all`: any number of updates, two by two, each decomposed once; a directory keeps every pair apart."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import Source
from spectra.errors import SelectionError, StoreError, refuse_path_for_source
from spectra.metrics.similarity import Side
from spectra.results import fingerprint
from spectra.results.collection import Spectra
from spectra.results.comparison import check_vectors, compare_links, compare_spectra_links
from spectra.results.pair_folders import PAIRS, pair_folder
from spectra.results.pairs import Pair
from spectra.results.partners import Link, links_of
from spectra.results.resume import Kept, check_files, delta_keys
from spectra.results.similarities import NotCompared
from spectra.results.store import NO_KEY, Store
from spectra.results.streams import opened


def compare_all(
    updates: Mapping[str, Iterable[WeightDelta] | Spectra | str | Path],
    *,
    top: int = 30,
    sides: Sequence[Side] = ("left",),
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
    out: str | Path | None = None,
    notes: list[str] | None = None,
    reused: list[str] | None = None,
) -> Iterator[Pair]:
    """Subspace similarity of every two of several updates, matrix by matrix, as `compare` gives it for two.

    A matrix of an update is decomposed once, not once per pair, and its vectors are held until those of the same weight
    in the other updates are there: what is in memory is one weight's vectors of all updates, (out + in)·(top + 1)
    float64 each, whatever the number of weights and pairs. `Pairs(compare_all(…))` pools them.

    Args:
        updates: what each is called → a source, deltas, or spectra with vectors; all of one kind. A path is either, as
            for `compare`.
        top: how many directions.
        sides: "left", "right" or both.
        device: as for `decompose`.
        executor: as for `decompose`.
        memory_budget: as for `decompose`.
        out: a results directory with one for each pair in `pairs/`, as `compare(…, out=)` makes it. Only what is
            missing is computed: after a kill, for new matrices, for new updates.
        notes: gets what was found damaged there, as far as the stream has come.
        reused: gets the name of each pair of matrices that was stored there before, likewise.

    Raises:
        SelectionError: no mapping, fewer than two updates, not of a kind, no two share a matrix, or out for deltas of
            no source.
        StoreError: out holds results of other inputs, or cannot be written to.

    Example:
        >>> import numpy as np
        >>> from spectra.spectrum import Spectrum
        >>> one = Spectra([Spectrum("w", (2, 2), S=[2.0, 1.0], U=np.eye(2), Vh=np.eye(2))])
        >>> turned = Spectra([Spectrum("w", (2, 2), S=[2.0, 1.0], U=np.eye(2)[::-1], Vh=np.eye(2))])
        >>> [(pair.a, pair.b, pair.outcome.phi) for pair in compare_all({"a": one, "b": turned, "c": one}, top=1)]
        [('a', 'b', 0.0), ('a', 'c', 1.0), ('b', 'c', 0.0)]
    """
    if not isinstance(updates, Mapping):
        raise SelectionError("compare_all takes what each update is called and the update: {'a': …, 'b': …}")
    labels, sources = list(updates), [opened(update) for update in updates.values()]
    for source in sources:
        refuse_path_for_source(source, "compare_all")
    if len(sources) < 2:
        raise SelectionError(f"updates are compared two by two, and {len(sources)} was given: give two or more")
    stored = [isinstance(source, Spectra) for source in sources]
    if any(stored) and not all(stored):
        raise SelectionError("some of the updates are spectra and the others weights: give updates of a kind")
    if all(stored):
        return _of_spectra(labels, sources, top, sides, out, notes)  # type: ignore[arg-type]
    compute: dict[str, Any] = {"device": device, "executor": executor, "memory_budget": memory_budget}
    return _of_weights(labels, sources, top, sides, out, notes, reused, compute)  # type: ignore[arg-type]


def _of_weights(
    labels: Sequence[str],
    sources: Sequence[Iterable[WeightDelta]],
    top: int,
    sides: Sequence[Side],
    out: str | Path | None,
    notes: list[str] | None,
    reused: list[str] | None,
    compute: Mapping[str, Any],
) -> Iterator[Pair]:
    deltas = [{delta.name: delta for delta in source} for source in sources]
    links = _checked(labels, [list(update) for update in deltas])
    kept = None if out is None else _begin(out, labels, sources, links, top, sides, notes)
    yield from _one_sided(labels, [list(update) for update in deltas], links)
    missing: list[Link] = []
    for link in links:
        similarities = kept.stored(link) if kept else []
        yield from (Pair(labels[link.a[0]], labels[link.b[0]], item) for item in similarities)
        missing += [] if similarities else [link]
        if similarities and reused is not None:
            reused.append(link.a[1])
    for link, item in compare_links(deltas, missing, top=top, sides=sides, **compute):
        if kept:
            kept.put(link, item)
        yield Pair(labels[link.a[0]], labels[link.b[0]], item)
    for store in kept.stores.values() if kept else ():
        store.finish()  # also where nothing was missing: the run before may have been killed just before its tables


def _of_spectra(
    labels: Sequence[str],
    runs: Sequence[Spectra],
    top: int,
    sides: Sequence[Side],
    out: str | Path | None,
    notes: list[str] | None,
) -> Iterator[Pair]:
    check_vectors(runs, top)
    links = _checked(labels, [run.names for run in runs])
    stores: dict[tuple[int, int], Store] = {}
    if out is not None:
        options = runs[0].run.get("inputs", {}).get("options", {})
        inputs = {"base": None, "options": options, "top": top}
        stores = _stores(out, labels, inputs, [{}] * len(runs), sides, {}, notes)
    yield from _one_sided(labels, [run.names for run in runs], links)
    for link, item in compare_spectra_links(runs, links, top=top, sides=sides):
        if stores and not isinstance(item, NotCompared):
            stores[link.a[0], link.b[0]].put_similarity(item)
        yield Pair(labels[link.a[0]], labels[link.b[0]], item)
    for store in stores.values():
        store.finish()


def _checked(labels: Sequence[str], names: Sequence[Sequence[str]]) -> list[Link]:
    links = links_of(names)
    if not links:
        examples = ", ".join(f"{label}: {next(iter(own), 'nothing')}" for label, own in zip(labels, names, strict=True))
        raise SelectionError(f"no two of the updates share a matrix ({examples}): compare updates of the same base")
    return links


def _one_sided(labels: Sequence[str], names: Sequence[Sequence[str]], links: Sequence[Link]) -> Iterator[Pair]:
    """The matrices of each pair that only one of the two has."""
    linked: dict[tuple[int, int], tuple[set[str], set[str]]] = {}
    for link in links:
        first, second = linked.setdefault((link.a[0], link.b[0]), (set(), set()))
        first.add(link.a[1])
        second.add(link.b[1])
    for i, a in enumerate(labels):
        for j in range(i + 1, len(labels)):
            first, second = linked.get((i, j), (set(), set()))
            for own, there, label in ((names[i], first, a), (names[j], second, labels[j])):
                for name in own:
                    if name not in there:
                        yield Pair(a, labels[j], NotCompared(name, f"only in {label}", one_sided=True))


def _begin(
    out: str | Path,
    labels: Sequence[str],
    sources: Sequence[Iterable[WeightDelta]],
    links: Sequence[Link],
    top: int,
    sides: Sequence[Side],
    notes: list[str] | None,
) -> Kept:
    for source in sources:
        if not isinstance(source, Source):
            raise SelectionError("out= keeps the results of sources: open files with open_source")
        check_files(source)
    kept = [source for source in sources if isinstance(source, Source)]
    base = next((source.base for source in kept if source.base), None)
    inputs = {"base": base, "options": dict(kept[0].options), "top": top}
    files = [fingerprint.of_files(source) for source in kept]
    compared = Kept({}, [delta_keys(source) for source in kept], sides, top)
    keys: dict[tuple[int, int], set[str]] = {}
    for link in links:
        keys.setdefault((link.a[0], link.b[0]), set()).add(compared.key(link))
    return replace(compared, stores=_stores(out, labels, inputs, files, sides, keys, notes))


def _stores(
    out: str | Path,
    labels: Sequence[str],
    inputs: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    sides: Sequence[Side],
    keys: Mapping[tuple[int, int], Collection[str]],
    notes: list[str] | None,
) -> dict[tuple[int, int], Store]:
    """A results directory per pair, and what the whole is in `run.json`; keys: fingerprints of each pair's results."""
    details = {"command": sys.argv, "sides": sides}
    whole = Store(out, notes=notes)
    known = _known(whole)
    folders = {(i, j): pair_folder(a, labels[j]) for i, a in enumerate(labels) for j in range(i + 1, len(labels))}
    named = {folder: [labels[i], labels[j]] for (i, j), folder in folders.items()}
    everything = {path: file for some in files for path, file in some.items()}
    whole.begin({"kind": "similarities", **inputs, "files": everything}, {**details, "pairs": {**known, **named}})
    stores = {}
    for (i, j), folder in folders.items():
        stores[i, j] = Store(whole.directory / PAIRS / folder, notes=notes)
        pair = {"kind": "similarity", "a": labels[i], "b": labels[j], **inputs, "files": {**files[i], **files[j]}}
        stores[i, j].begin(pair, details, keys.get((i, j), [NO_KEY]))
    return stores


def _known(whole: Store) -> Mapping[str, Sequence[str]]:
    """Folder → labels of the pairs that are there; as they say themselves where the whole's `run.json` is damaged."""
    try:
        said: Mapping[str, Sequence[str]] = whole.run().get("pairs", {})
        return said
    except StoreError:
        found = {}
        for folder in sorted((whole.directory / PAIRS).glob("*")):
            with suppress(StoreError):
                inputs = Store(folder).run().get("inputs", {})
                found[folder.name] = [inputs["a"], inputs["b"]] if {"a", "b"} <= inputs.keys() else []
        return {folder: labels for folder, labels in found.items() if labels}
