"""Updates, matrix by matrix: subspace similarity as a stream, every matrix's vectors computed once and let go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from spectra.deltas.at_work import announce
from spectra.deltas.delta import WeightDelta
from spectra.engine.accounts import account_of
from spectra.engine.decompose import decompose_indexed
from spectra.errors import SelectionError
from spectra.metrics.similarity import Side, subspace_similarity
from spectra.results.collection import Spectra
from spectra.results.partners import By, Link, groups_of, partners
from spectra.results.similarities import Compared, NotCompared
from spectra.spectrum import DONE, Spectrum

_AT_ONCE = 32  # matrices whose vectors may wait for their partners; more only where one weight has more updates


def compare_deltas(
    a: Iterable[WeightDelta],
    b: Iterable[WeightDelta],
    *,
    top: int,
    sides: Sequence[Side],
    by: By = "name",
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> Iterator[Compared]:
    """As `compare`, from weights; vectors wait for their partner only."""
    first, second = {delta.name: delta for delta in a}, {delta.name: delta for delta in b}
    links = pair_links(list(first), list(second), by)
    yield from one_sided(first, second, links)
    for _, item in compare_links(
        [first, second], links, top=top, sides=sides, device=device, executor=executor, memory_budget=memory_budget
    ):
        yield item


def compare_links(
    updates: Sequence[Mapping[str, WeightDelta]],
    links: Iterable[Link],
    *,
    top: int,
    sides: Sequence[Side],
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> Iterator[tuple[Link, Compared]]:
    """Every link's similarities as they finish; a matrix that is in several links is decomposed once.

    Args:
        updates: name → delta, one mapping for each update.
        links: which to compare with which.
        top: as for `compare`.
        sides: as for `compare`.
        device: as for `compare`.
        executor: as for `compare`.
        memory_budget: as for `compare`.
    """
    links = list(links)
    every = dict.fromkeys(member for link in links for member in (link.a, link.b))
    # One more than is compared: the gap behind the last says how well the directions are determined.
    wanted: dict[str, Any] = {"top": top + 1, "only_top": True, "device": device, "executor": executor}
    account = announce(account_of([updates[place][name] for place, name in every], **wanted))
    for wave in _waves(groups_of(links).values()):
        members = list(dict.fromkeys(member for link in wave for member in (link.a, link.b)))
        left = Counter(member for link in wave for member in (link.a, link.b))
        by_member: dict[tuple[int, str], list[Link]] = {}
        for link in wave:
            for member in (link.a, link.b):
                by_member.setdefault(member, []).append(link)
        here: dict[tuple[int, str], Spectrum] = {}
        deltas = [updates[place][name] for place, name in members]
        for index, spectrum in decompose_indexed(deltas, budget=memory_budget, account=account, **wanted):
            here[members[index]] = spectrum
            for link in by_member[members[index]]:
                if link.a in here and link.b in here:
                    for item in compare_pair(here[link.a], here[link.b], top=top, sides=sides):
                        yield link, item
                    left.subtract([link.a, link.b])
            for member in [member for member in here if not left[member]]:
                del here[member]


def _waves(groups: Iterable[list[Link]]) -> Iterator[list[Link]]:
    """Groups together while they have few members: enough to keep the cores busy, few enough to hold."""
    wave: list[Link] = []
    members: set[tuple[int, str]] = set()
    for group in groups:
        more = {member for link in group for member in (link.a, link.b)}
        if wave and len(members) + len(more) > _AT_ONCE:
            yield wave
            wave, members = [], set()
        wave, members = wave + group, members | more
    if wave:
        yield wave


def compare_pair(a: Spectrum, b: Spectrum, *, top: int, sides: Sequence[Side]) -> Iterator[Compared]:
    """Every side's similarity of two spectra, or the reason why there is none."""
    frozen = _unchanged(a, b)
    if frozen:
        where = "both updates" if len(frozen) == 2 else f"the {frozen[0]} update"
        yield NotCompared(a.name, f"unchanged in {where}: ΔW = 0 has no directions", unchanged=frozen)
        return
    for side in sides:
        try:
            yield subspace_similarity(a, b, top=top, side=side)
        except SelectionError as problem:
            reason = str(problem).removeprefix(f"{a.name} cannot be compared: ").removeprefix("ok: ")
            yield NotCompared(a.name, reason)
            return


def _unchanged(a: Spectrum, b: Spectrum) -> tuple[str, ...]:
    """Which of the two updates are exactly zero, where the other is that or could be compared."""
    if not {a.status, b.status} <= set(DONE):
        return ()
    return tuple(which for which, spectrum in (("first", a), ("second", b)) if spectrum.status == "unchanged")


def compare_spectra(a: Spectra, b: Spectra, *, top: int, sides: Sequence[Side], by: By = "name") -> Iterator[Compared]:
    """As `compare`, from the vectors that are there."""
    links = pair_links(a.names, b.names, by)
    check_vectors((a, b), top)
    yield from one_sided(a.names, b.names, links)
    for link in links:
        yield from compare_pair(a[link.a[1]], b[link.b[1]], top=top, sides=sides)


def check_vectors(updates: Iterable[Spectra], top: int) -> None:
    """Raise if a collection has singular values only.

    Raises:
        SelectionError: it has; one sentence for all its matrices.
    """
    for update in updates:
        if update.lacks_vectors:
            raise SelectionError(
                f"{update.directory or 'one of the updates'} holds no singular vectors to compare: decompose with "
                f"top={top} (spectra svd … --top {top} --out …), or compare the sources themselves"
            )


def compare_spectra_links(
    updates: Sequence[Spectra], links: Iterable[Link], *, top: int, sides: Sequence[Side]
) -> Iterator[tuple[Link, Compared]]:
    """As `compare_links`, from the vectors that are there; those of one weight are read once and held together."""
    for group in groups_of(links).values():
        members = dict.fromkeys(member for link in group for member in (link.a, link.b))
        here = {(place, name): updates[place][name] for place, name in members}
        for link in group:
            for item in compare_pair(here[link.a], here[link.b], top=top, sides=sides):
                yield link, item


def pair_links(first: Sequence[str], second: Sequence[str], by: By) -> list[Link]:
    """The links of two updates.

    Raises:
        SelectionError: there is none.
    """
    links = [Link((0, name), (1, other)) for name, other in partners(first, second, by)]
    if not links:
        examples = [next(iter(names), "nothing") for names in (first, second)]
        what = "share no matrix" if by == "name" else "have no layer in common"
        raise SelectionError(
            f"the two updates {what}: the first has {len(first)} such as {examples[0]!r}, "
            f"the second {len(second)} such as {examples[1]!r}; compare updates of the same base"
        )
    return links


def one_sided(first: Iterable[str], second: Iterable[str], links: Iterable[Link]) -> Iterator[NotCompared]:
    """The matrices of two updates that are in none of their links."""
    pairs = [(link.a[1], link.b[1]) for link in links]
    for which, names, linked in (
        ("first", first, {name for name, _ in pairs}),
        ("second", second, {name for _, name in pairs}),
    ):
        for name in names:
            if name not in linked:
                yield NotCompared(name, f"only in the {which} update", one_sided=True)
