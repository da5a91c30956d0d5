"""Two updates, matrix by matrix: subspace similarity as a stream, without keeping either side's vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor

from spectra.deltas.delta import WeightDelta
from spectra.engine.decompose import decompose_indexed
from spectra.errors import SelectionError
from spectra.metrics.similarity import Side, subspace_similarity
from spectra.results.collection import Spectra
from spectra.results.similarities import Compared, NotCompared
from spectra.spectrum import Spectrum

_PAIRS_AT_ONCE = 16  # bounds the vectors that wait for their partner


def compare_deltas(
    a: Iterable[WeightDelta],
    b: Iterable[WeightDelta],
    *,
    top: int,
    sides: Sequence[Side],
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> Iterator[Compared]:
    """As `compare`, from weights; vectors wait for their partner only."""
    first, second = {delta.name: delta for delta in a}, {delta.name: delta for delta in b}
    shared = [name for name in first if name in second]
    _check_shared(shared, first, second)
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


def compare_pair(a: Spectrum, b: Spectrum, *, top: int, sides: Sequence[Side]) -> Iterator[Compared]:
    """Every side's similarity of two spectra, or the reason why there is none."""
    for side in sides:
        try:
            yield subspace_similarity(a, b, top=top, side=side)
        except SelectionError as problem:
            yield NotCompared(a.name, str(problem))
            return


def _check_shared(shared: Sequence[str], a: Mapping[str, object], b: Mapping[str, object]) -> None:
    """Raise if two sets of matrices have no name in common."""
    if not shared:
        examples = [next(iter(names), "nothing") for names in (a, b)]
        raise SelectionError(
            f"the two updates share no matrix: the first has {len(a)} such as {examples[0]!r}, "
            f"the second {len(b)} such as {examples[1]!r}; compare updates of the same base"
        )


def compare_spectra(a: Spectra, b: Spectra, *, top: int, sides: Sequence[Side]) -> Iterator[Compared]:
    """As `compare`, from the vectors that are there."""
    first, second = dict.fromkeys(a.names), dict.fromkeys(b.names)
    shared = [name for name in first if name in second]
    _check_shared(shared, first, second)
    yield from _one_sided(first, second)
    for name in shared:
        yield from compare_pair(a[name], b[name], top=top, sides=sides)


def _one_sided(first: Mapping[str, object], second: Mapping[str, object]) -> Iterator[NotCompared]:
    for name in [*first, *second]:
        if name not in first or name not in second:
            yield NotCompared(name, f"only in the {'first' if name in first else 'second'} update", one_sided=True)
