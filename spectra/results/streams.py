"""`decompose` and `compare`: streams of results, which a directory can keep and resume."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from spectra import text
from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import Source
from spectra.engine.decompose import decompose_indexed
from spectra.errors import SelectionError, refuse_path_for_source
from spectra.metrics.similarity import Side
from spectra.results.collection import Spectra, holds_results, load
from spectra.results.comparison import compare_deltas, compare_spectra
from spectra.results.partners import By
from spectra.results.recorded import recorded_source
from spectra.results.records import Precision, check_precision
from spectra.results.resume import compare_into, decompose_into, keep_comparisons
from spectra.results.similarities import Compared
from spectra.sources import open_source
from spectra.spectrum import Spectrum


class Comparisons(Iterator[Compared]):
    """The comparisons of two updates while they are made: a stream, each as soon as it is finished.

    Attributes:
        reused: the names of the matrices that came from `out`, as far as the stream has come.
        notes: what was found damaged there, likewise.
    """

    def __init__(self, stream: Iterator[Compared], reused: Collection[str] = (), notes: Collection[str] = ()) -> None:
        self.reused = reused
        self.notes = notes
        self._stream = stream

    def __next__(self) -> Compared:
        return next(self._stream)


class Decomposition(Iterator[Spectrum]):
    """The spectra of a source while they are computed: a stream, each as soon as it is finished.

    Attributes:
        names: the weights' names in the source's order.
        reused: the names of those that came from `out`, where they were stored before, as far as the stream has come.
        notes: what was found damaged there, likewise.
    """

    def __init__(
        self,
        stream: Iterator[Spectrum],
        names: Iterable[str],
        out: str | Path | None = None,
        reused: Collection[str] = (),
        notes: Collection[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.reused = reused
        self.notes = notes
        self._stream = stream
        self._out = out
        self._begun = False

    def __next__(self) -> Spectrum:
        self._begun = True
        return next(self._stream)

    def __len__(self) -> int:
        return len(self.names)

    def collect(self) -> Spectra:
        """Compute all of them: a collection in the source's order.

        It is in memory, or on the disk where `out` keeps it.

        Raises:
            SelectionError: some were taken from the stream already.
        """
        if self._begun:
            raise SelectionError("spectra were taken from this stream already; call decompose(…).collect() at once")
        if self._out is None:
            place = {name: place for place, name in enumerate(self.names)}
            return Spectra(sorted(self, key=lambda spectrum: place[spectrum.name]))
        for _ in self:
            pass  # each is stored before it is passed on
        return Spectra.stored(self._out, self.names)

    def __repr__(self) -> str:
        return f"Decomposition({text.matrices(len(self))}{', begun' if self._begun else ''})"


def decompose(
    source: Iterable[WeightDelta] | str | Path,
    *,
    top: int | None = None,
    only_top: bool = False,
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
    out: str | Path | None = None,
    rehash: bool = False,
    vectors: Precision = "float32",
) -> Decomposition:
    """The singular spectrum of every delta, each as soon as it is finished: not in the input's order.

    Iterate over it, or call `.collect()` for a `Spectra` in the input's order. With `out`, every result is stored
    there before it comes, and one that is stored already is not computed again: killed at any moment, the same call
    goes on. `spectra svd --out` makes the same directory.

    Args:
        source: a `Source` or any deltas; a path, hub id or alias is opened with `open_source`.
        top: None for singular values only; K for all values and the top K vectors.
        only_top: the top K values and vectors alone.
        device: "auto", "cpu", "cuda" or "cuda:i".
        executor: where to run; None for this process. Deltas travel to it as recipes.
        memory_budget: bytes or "4GiB" for all matrices at work together; None for half of what is free.
        out: a results directory for a source that was read from files; None to store nothing.
        rehash: whether files are those of the stored results is told by size, time, header and sampled blocks; True
            reads and hashes all of each file, and holds that against the hash of an earlier run with it.
        vectors: what `out` keeps singular vectors in: "float32", which changes each entry by at most 6e-8 of itself
            and no φ by more than 1e-6, or "float64", which takes twice the room. They come as float64 arrays either
            way; values are float64 always. What is stored in float64 serves both, what is in float32 is computed again
            for "float64".

    Raises:
        SelectionError: top is not positive, only_top without top, out for deltas that are no source's, vectors is
            neither of the two, or the source holds results already.
        DeviceError: the device is not there.
        StoreError: out holds results of other inputs, or cannot be written to.

    Example:
        >>> import torch
        >>> values = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
        >>> deltas = [WeightDelta.from_tensor(name, torch.diag(row)) for name, row in zip("ab", values)]
        >>> [spectrum.S.tolist() for spectrum in decompose(deltas).collect()]
        [[4.0, 3.0], [2.0, 1.0]]
    """
    check_precision(vectors)
    source = _weights(source)
    deltas = source.deltas if isinstance(source, Source) else tuple(source)
    names = [delta.name for delta in deltas]
    if out is None:
        indexed = decompose_indexed(
            deltas, top=top, only_top=only_top, device=device, executor=executor, budget=memory_budget
        )
        return Decomposition((spectrum for _, spectrum in indexed), names)
    reused: list[str] = []
    notes: list[str] = []
    stream = decompose_into(
        out,
        _to_keep(source),
        reused,
        notes,
        top=top,
        only_top=only_top,
        device=device,
        executor=executor,
        budget=memory_budget,
        rehash=rehash,
        vectors=vectors,
    )
    return Decomposition(stream, names, out, reused, notes)


def compare(
    a: Iterable[WeightDelta] | Spectra | str | Path,
    b: Iterable[WeightDelta] | Spectra | str | Path,
    *,
    top: int = 30,
    sides: Sequence[Side] = ("left",),
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
    out: str | Path | None = None,
    labels: tuple[str, str] | None = None,
    by: By = "name",
) -> Comparisons:
    """Subspace similarity of the matrices that two updates share, as they finish; the others as `NotCompared`.

    Matrices of one name belong together, and each head of an adapter (`heads="each"`) with the same weight of an
    update without heads. With by="layer" those of one layer do, whatever they are called:
    `compare(source.select("q_proj"), source.select("k_proj"), by="layer", sides=("right",))` asks whether query and key
    read the same inputs.

    Args:
        a: a source or deltas; or spectra that hold vectors, such as `load(…)` gives. A path is either: results that
            are stored there, or a model or adapter; where vectors are wanting, a stored run is what it was made of.
        b: likewise, two of a kind.
        top: how many directions.
        sides: "left", "right" or both.
        device: as for `decompose`; spectra need no computing.
        executor: as for `decompose`.
        memory_budget: as for `decompose`.
        out: a results directory, which resumes; `spectra similarity --out` makes the same one.
        labels: what the two are called in the directory's record and figures; None for where they come from.
        by: "name", or "layer" for matrices of different roles.

    Raises:
        SelectionError: the two share no matrix, are not of a kind, or out is given for deltas that are no source's; of
            spectra, none of the matrices they share has vectors; by layer, one matrix has several partners.
        StoreError: out holds results of other inputs, or cannot be written to.

    Example:
        >>> import numpy as np
        >>> one = Spectra([Spectrum("w", (2, 2), S=[2.0, 1.0], U=np.eye(2), Vh=np.eye(2))])
        >>> [(similarity.name, similarity.phi) for similarity in compare(one, one, top=1)]
        [('w', 1.0)]
    """
    a, b = _of_a_kind(a, b, top)
    for update in (a, b):
        refuse_path_for_source(update, "compare")
    if isinstance(a, Spectra) and isinstance(b, Spectra):
        comparisons = compare_spectra(a, b, top=top, sides=sides, by=by)
        if out is None:
            return Comparisons(comparisons)
        places = (str(a.directory or "") or None, str(b.directory or "") or None)
        options = a.run.get("inputs", {}).get("options", {})
        inputs = _identity(labels or places, None, options, by)
        return Comparisons(keep_comparisons(out, comparisons, inputs, top=top, sides=sides))
    if isinstance(a, Spectra) or isinstance(b, Spectra):
        raise SelectionError("one of the two holds spectra and the other weights: give two of a kind")
    compute: dict[str, Any] = {"device": device, "executor": executor, "memory_budget": memory_budget}
    if out is None:
        return Comparisons(compare_deltas(a, b, top=top, sides=sides, by=by, **compute))
    first, second = _to_keep(a), _to_keep(b)
    inputs = _identity(labels or (first.tuned, second.tuned), first.base or second.base, first.options, by)
    reused: list[str] = []
    notes: list[str] = []
    stream = compare_into(out, first, second, inputs, reused, notes, top=top, sides=sides, by=by, **compute)
    return Comparisons(stream, reused, notes)


def _of_a_kind(
    a: Iterable[WeightDelta] | Spectra | str | Path, b: Iterable[WeightDelta] | Spectra | str | Path, top: int
) -> tuple[Iterable[WeightDelta] | Spectra, Iterable[WeightDelta] | Spectra]:
    """Two results with vectors or two updates, where paths leave the choice."""
    first, second = opened(a), opened(b)
    if all(isinstance(one, Spectra) and not one.lacks_vectors for one in (first, second)):
        return first, second
    if isinstance(a, str | Path) and isinstance(first, Spectra):
        first = recorded_source(first, top + 1)
    if isinstance(b, str | Path) and isinstance(second, Spectra):
        second = recorded_source(second, top + 1)
    return first, second


def opened(given: Iterable[WeightDelta] | Spectra | str | Path) -> Iterable[WeightDelta] | Spectra:
    """Stored results or a source, where a path is given."""
    if not isinstance(given, str | Path):
        return given
    return load(given) if holds_results(given) else open_source(given)


def _weights(given: Iterable[WeightDelta] | str | Path) -> Iterable[WeightDelta]:
    """What can be decomposed, opened where it is a path.

    Raises:
        SelectionError: it holds results already.
    """
    if isinstance(given, Spectra):
        raise SelectionError("these are spectra already; decompose takes a source: open_source(tuned, base)")
    if not isinstance(given, str | Path):
        refuse_path_for_source(given, "decompose")
        return given
    if holds_results(given):
        raise SelectionError(f"{given} holds results already: load({str(given)!r}) brings them back")
    return open_source(given)


def _identity(
    labels: tuple[str | None, str | None], base: str | None, options: Mapping[str, Any], by: By
) -> dict[str, Any]:
    """What identifies a comparison in `run.json`, beside its files."""
    a, b = labels
    across = {} if by == "name" else {"by": by}
    return {"kind": "similarity", "a": a, "b": b, "base": base, "options": dict(options), **across}


def _to_keep(source: Iterable[WeightDelta]) -> Source:
    """The source, if it is one: only what says where it was read from can be recognised when it comes again."""
    if not isinstance(source, Source):
        raise SelectionError("out= keeps the results of a source: open files with open_source, or save(…) the spectra")
    return source
