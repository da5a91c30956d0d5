"""Computing into a results directory: what is stored is not computed again."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectra._version import __version__
from spectra.deltas.recipes import InMemory
from spectra.deltas.source import Source
from spectra.engine.decompose import decompose_indexed, libraries_for, threads_for
from spectra.errors import SelectionError, StoreError
from spectra.files.memory import CONTAINER
from spectra.metrics.similarity import Side, SubspaceSimilarity
from spectra.results import fingerprint, tables
from spectra.results.comparison import compare_links, one_sided, pair_links
from spectra.results.partners import By, Link
from spectra.results.records import Precision
from spectra.results.similarities import Compared
from spectra.results.store import NO_KEY, Store
from spectra.spectrum import Spectrum
from spectra.text import matrices


def decompose_into(
    out: str | Path,
    source: Source,
    reused: list[str],
    notes: list[str],
    *,
    top: int | None = None,
    only_top: bool = False,
    device: str = "auto",
    executor: Executor | None = None,
    budget: int | str | None = None,
    rehash: bool = False,
    vectors: Precision = "float32",
) -> Iterator[Spectrum]:
    """The spectra of a source, stored ones first, new ones as they finish and are stored.

    A stored result counts if it comes from the same files, recipe and code version and holds at
    least what is asked for. Where more is stored than asked for, as much is computed.

    Args:
        out: the results directory.
        source: what to decompose; the options that it was opened with are part of the run's identity.
        reused: gets the names of those that are stored already.
        notes: gets what was found damaged.
        top: as for `decompose`.
        only_top: as for `decompose`.
        device: as for `decompose`.
        executor: as for `decompose`.
        budget: as `memory_budget` for `decompose`.
        rehash: as for `decompose`.
        vectors: as for `decompose`.

    Raises:
        StoreError: the directory holds results of other inputs, or cannot be written to.
        SelectionError: a matrix comes from no file.
    """
    check_files(source)
    store = Store(out, notes=notes)
    threads = None if executor else _threads(store, source, top, device, budget)
    keys = [fingerprint.of_delta(delta) for delta in source]
    store.begin(_inputs(source, rehash), _details(source, top, device, threads, vectors), keys)
    missing: dict[tuple[int, bool, Precision], list[int]] = {}
    again = 0
    for place, delta in enumerate(source):
        stored = store.stored(delta.name, keys[place], top, only_top, vectors)
        if stored is not None:
            reused.append(delta.name)
            yield stored
        else:
            values, k, kept = store.kept(delta.name)
            again += bool(top and k and kept < vectors)
            missing.setdefault((max(top or 0, k), only_top and not values, max(vectors, kept)), []).append(place)
    if again:
        notes.append(f"vectors in {out} are float32: {matrices(again)} computed again for float64")
    for (k, only, precision), places in missing.items():
        deltas = [source.deltas[place] for place in places]
        stream = decompose_indexed(
            deltas,
            top=k or None,
            only_top=only,
            device=device,
            executor=executor,
            budget=budget,
            threads=threads,
            look=tables.measure,
        )
        for index, spectrum in stream:
            yield store.put(spectrum, keys[places[index]], precision)
    store.finish()


def compare_into(
    out: str | Path,
    a: Source,
    b: Source,
    inputs: Mapping[str, Any],
    reused: list[str],
    notes: list[str],
    *,
    top: int,
    sides: Sequence[Side],
    by: By = "name",
    **compute: Any,
) -> Iterator[Compared]:
    """The comparisons of two sources, stored ones first, new ones as they finish and are stored.

    Args:
        out: the results directory.
        a: one source.
        b: the other.
        inputs: what identifies the run beside the files.
        reused: gets the names of those that are stored already.
        notes: gets what was found damaged.
        top: as for `compare`.
        sides: as for `compare`.
        by: as for `compare`.
        compute: device, executor and memory_budget, as for `compare`.

    Raises:
        StoreError: the directory holds results of other inputs, or cannot be written to.
        SelectionError: the two share no name, or a matrix comes from no file.
    """
    check_files(a)
    check_files(b)
    store = Store(out, notes=notes)
    links = pair_links(a.names, b.names, by)
    kept = Kept({(0, 1): store}, [delta_keys(source) for source in (a, b)], sides, top)
    files = fingerprint.of_files(a) | fingerprint.of_files(b)
    details = {"command": sys.argv, "sides": sides}
    store.begin({**inputs, "top": top, "files": files}, details, [kept.key(link) for link in links])
    yield from one_sided(a.names, b.names, links)
    updates = [{delta.name: delta for delta in source} for source in (a, b)]
    missing = []
    for link in links:
        similarities = kept.stored(link)
        reused += [link.a[1]] if similarities else []
        missing += [] if similarities else [link]
        yield from similarities
    for link, item in compare_links(updates, missing, top=top, sides=sides, **compute):
        kept.put(link, item)
        yield item
    store.finish()


def delta_keys(source: Source) -> dict[str, str]:
    """Name → fingerprint of every matrix."""
    return {delta.name: fingerprint.of_delta(delta) for delta in source}


@dataclass(frozen=True)
class Kept:
    """Where the comparisons of every two updates are kept, and what tells whether they are those of today's inputs.

    Attributes:
        stores: places of two updates → the results directory of their comparison.
        keys: of each update, name → fingerprint.
        sides: which sides are wanted.
        top: how many directions.
    """

    stores: Mapping[tuple[int, int], Store]
    keys: Sequence[Mapping[str, str]]
    sides: Sequence[Side]
    top: int

    def stored(self, link: Link) -> list[SubspaceSimilarity]:
        """Every side's stored comparison; [] if one is missing or was made from other inputs."""
        (i, name), (j, other) = link.a, link.b
        key, different = self.key(link), other if other != name else ""
        similarities = [self.stores[i, j].similarity_of(name, side, key, different) for side in self.sides]
        return [item for item in similarities if item] if all(similarities) else []

    def put(self, link: Link, item: Compared) -> None:
        """Store a comparison; why there is none is found out again each time."""
        if isinstance(item, SubspaceSimilarity):
            self.stores[link.a[0], link.b[0]].put_similarity(item, self.key(link))

    def key(self, link: Link) -> str:
        """The fingerprint of a comparison."""
        (i, name), (j, other) = link.a, link.b
        return fingerprint.of_pair(self.keys[i][name], self.keys[j][other], self.top)


def keep_comparisons(
    out: str | Path, comparisons: Iterable[Compared], inputs: Mapping[str, Any], *, top: int, sides: Sequence[Side]
) -> Iterator[Compared]:
    """Comparisons of stored vectors, stored in turn; they are quick enough to make anew each time.

    Args:
        out: the results directory.
        comparisons: as they come.
        inputs: what identifies the run.
        top: as for `compare`.
        sides: as for `compare`.

    Raises:
        StoreError: the directory holds results of other inputs, or cannot be written to.
    """
    store = Store(out)
    store.begin({**inputs, "top": top}, {"command": sys.argv, "sides": sides}, [NO_KEY])
    for item in comparisons:
        if isinstance(item, SubspaceSimilarity):
            store.put_similarity(item)
        yield item
    store.finish()


def _threads(store: Store, source: Source, top: int | None, device: str, budget: int | str | None) -> int | None:
    """Threads per matrix: as this run began, or as all of its matrices need, however many are left.

    The last bits of a result depend on it, and a resumed run has to equal an undisturbed one.
    """
    try:
        stored = store.run().get("threads_per_matrix")
    except StoreError:
        stored = None
    return (
        stored
        if type(stored) is int and stored > 0
        else threads_for(source.deltas, top=top, device=device, budget=budget)
    )


def check_files(source: Source) -> None:
    """Raise if a matrix is in memory only: nothing would tell the stored result from that of another matrix."""
    for delta in source:
        if isinstance(delta.recipe, InMemory) or any(ref.container == CONTAINER for ref in delta.refs):
            raise SelectionError(
                f"{delta.name} is a matrix in memory, which out= cannot recognise again; leave out= away and save(…)"
            )


def _inputs(source: Source, rehash: bool) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "tuned": fingerprint.where(source.tuned),
        "base": fingerprint.where(source.base) if source.base else None,
        "options": dict(source.options),
        "files": fingerprint.of_files(source, rehash=rehash),
    }


def _details(source: Source, top: int | None, device: str, threads: int | None, vectors: Precision) -> dict[str, Any]:
    import numpy
    import torch

    return {
        "command": sys.argv,
        "top": top,
        "vectors": vectors,
        "device": device,
        "threads_per_matrix": threads,
        "eigenvalues": {str(size): library for size, library in libraries_for(source, threads).items()},
        "coverage": asdict(source.coverage),
        "versions": {
            "spectra": __version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }
