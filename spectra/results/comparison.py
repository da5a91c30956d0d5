"""Two sources, matrix by matrix: subspace similarity as a stream, without keeping either side's vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from spectra.deltas.delta import WeightDelta
from spectra.engine.decompose import decompose_indexed
from spectra.errors import SelectionError
from spectra.metrics.similarity import Side, SubspaceSimilarity, subspace_similarity
from spectra.results.store import StoredSpectra
from spectra.spectrum import Spectrum

_PAIRS_AT_ONCE = 16  # bounds the vectors that wait for their partner


@dataclass(frozen=True)
class NotCompared:
    """A matrix that has no similarity, and why."""

    name: str
    reason: str


def compare(
    a: Iterable[WeightDelta],
    b: Iterable[WeightDelta],
    *,
    top: int = 30,
    sides: Sequence[Side] = ("left",),
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> Iterator[SubspaceSimilarity | NotCompared]:
    """Compare the matrices that both have, by name; the others come back as `NotCompared`.

    Args:
        a: a source or deltas.
        b: likewise.
        top: how many directions.
        sides: "left", "right" or both.
        device: as for `decompose`.
        executor: as for `decompose`.
        memory_budget: as for `decompose`.

    Raises:
        SelectionError: the two share no name.
    """
    first, second = {delta.name: delta for delta in a}, {delta.name: delta for delta in b}
    shared = [name for name in first if name in second]
    check_shared(shared, first, second)
    yield from _one_sided(first, second)
    for start in range(0, len(shared), _PAIRS_AT_ONCE):
        names = shared[start : start + _PAIRS_AT_ONCE]
        deltas = [side[name] for name in names for side in (first, second)]
        waiting: dict[int, Spectrum] = {}
        for index, spectrum in decompose_indexed(
            deltas, top=top + 1, only_top=True, device=device, executor=executor, budget=memory_budget
        ):  # one more than is compared: the gap behind the last says how well the directions are determined
            partner = waiting.pop(index ^ 1, None)
            if partner is None:
                waiting[index] = spectrum
                continue
            pair = (partner, spectrum) if index % 2 else (spectrum, partner)
            yield from compare_pair(*pair, top=top, sides=sides)


def compare_pair(
    a: Spectrum, b: Spectrum, *, top: int, sides: Sequence[Side]
) -> Iterator[SubspaceSimilarity | NotCompared]:
    """Every side's similarity of two spectra, or the reason why there is none."""
    for side in sides:
        try:
            yield subspace_similarity(a, b, top=top, side=side)
        except SelectionError as problem:
            yield NotCompared(a.name, str(problem))
            return


def check_shared(shared: Sequence[str], a: Mapping[str, object], b: Mapping[str, object]) -> None:
    """Raise if two sets of matrices have no name in common."""
    if not shared:
        examples = [next(iter(names), "nothing") for names in (a, b)]
        raise SelectionError(
            f"the two updates share no matrix: the first has {len(a)} such as {examples[0]!r}, "
            f"the second {len(b)} such as {examples[1]!r}; compare updates of the same base"
        )


def compare_stored(
    a: StoredSpectra, b: StoredSpectra, *, top: int = 30, sides: Sequence[Side] = ("left",)
) -> Iterator[SubspaceSimilarity | NotCompared]:
    """As `compare`, from the vectors that two results directories keep.

    Raises:
        SelectionError: the two share no name.
    """
    first, second = dict.fromkeys(a.names), dict.fromkeys(b.names)
    shared = [name for name in first if name in second]
    check_shared(shared, first, second)
    yield from _one_sided(first, second)
    for name in shared:
        yield from compare_pair(a[name], b[name], top=top, sides=sides)


def _one_sided(first: Mapping[str, object], second: Mapping[str, object]) -> Iterator[NotCompared]:
    for name in [*first, *second]:
        if name not in first or name not in second:
            yield NotCompared(name, f"only in the {'first' if name in first else 'second'} update")
