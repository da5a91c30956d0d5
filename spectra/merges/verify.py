"""`verify_merge`: is this merged model the base with this adapter in it?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.deltas.at_work import Account, accounted
from spectra.engine.memory import memory_budget as budget_of
from spectra.engine.memory import readable_size
from spectra.errors import SourceError
from spectra.files.far import done, expected
from spectra.merges import causes
from spectra.merges.claims import Claim, Claims, open_claims
from spectra.merges.report import MatrixCheck, MergeReport, in_order

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.files.tensors import TensorRef

_OPEN = ("different", "unrelated base")


def verify_merge(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    *,
    layers: str | Sequence[str] | None = None,
    heads: str | int = "mean",
    scale: float | None = None,
    memory_budget: int | str | None = None,
) -> MergeReport:
    """Check every matrix of a merged model against W₀ + ΔW, one at a time.

    A matrix is `exact` if an order of operations that trainers and mergers use gives it bit for bit, `rounded` if it
    is within what such an order may round; whatever else it is, is said with the s that fits best and a likely
    cause. Matrices that the adapter does not touch must equal the base.

    Args:
        base: the model that the adapter was trained on: path, hub id or alias.
        adapter: the adapter, in any format of FORMATS that is not a full checkpoint.
        merged: the full weights that should be base + adapter.
        layers: only these matrices, as `--layer` means them.
        heads: "mean", "sum", "each" or an index, for multi-head adapters.
        scale: the scale s where the adapter does not carry it.
        memory_budget: bytes or "4GiB" for the matrix at work; None for half of what is free.

    Raises:
        SelectionError: one of the three is not what it should be, or a pattern of `layers` matches nothing.
        SourceError: the adapter changes no matrix of the base; a file is broken.

    Example:
        >>> import spectra
        >>> spectra.verify_merge("llama-7b", "my-lora/", "merged/").counts  # doctest: +SKIP
        {'not applied': 1, 'exact': 63}
    """
    claims = open_claims(base, adapter, merged, layers=layers, heads=heads, scale=scale)
    return report_of(claims, check_claims(claims.claims, memory_budget=memory_budget))


def check_claims(
    claims: Sequence[Claim], *, memory_budget: int | str | None = None
) -> Iterator[tuple[Claim, MatrixCheck | None]]:
    """Each claim with its row, in order; None where the adapter is silent and M = W₀.

    Several are at work side by side, as many as there are cores and bytes for. Rows whose cause is open come last:
    they take the updates of the other weights to compare with.
    """
    budget = budget_of(memory_budget)
    sizes = {claim.name: float(claim.bytes) for claim in claims if claim.bytes <= budget}
    yield from accounted(_checked(claims, budget), Account(sizes, sum(sizes.values())), lambda pair: pair[0].name)


def _checked(claims: Sequence[Claim], budget: int) -> Iterator[tuple[Claim, MatrixCheck | None]]:
    from spectra.engine.devices import cores
    from spectra.engine.executors.threads import keep_freed_memory, thread_executor

    largest = max((claim.bytes for claim in claims if claim.bytes <= budget), default=1)
    workers = max(1, min(cores(), len(claims), budget // max(1, largest)))
    unexplained: list[tuple[Claim, MatrixCheck, Tensor]] = []
    keep_freed_memory()
    reads = [_read_of(claim) for claim in claims if claim.bytes <= budget]
    with expected(reads, fetches=len(reads) > 1), thread_executor(workers, 1) as pool:
        futures = [pool.submit(_check, claim, budget) for claim in claims]
        try:
            for claim, future in zip(claims, futures, strict=True):
                row, sketch = future.result()
                if row is not None and sketch is not None:
                    unexplained.append((claim, row, sketch))
                else:
                    yield claim, row
        finally:
            for future in futures:
                future.cancel()
    yield from _explained(unexplained, claims)


def _read_of(claim: Claim) -> list[TensorRef]:
    pair = claim.pair.refs if claim.pair else ()
    updates = (ref for delta in claim.updates if delta.recipe and claim.pair for ref in delta.recipe.refs)
    return list(dict.fromkeys([*pair, *updates]))  # W₀ is handed to the updates that are formed from it


def _check(claim: Claim, budget: int) -> tuple[MatrixCheck | None, Tensor | None]:
    """One claim's row; a matrix above the budget or in a broken file has one that says so."""
    from spectra.merges.judge import check

    if claim.bytes > budget:
        needs = f"needs {readable_size(claim.bytes)}, the budget is {readable_size(budget)}; raise --memory"
        return MatrixCheck(claim.name, "too_large", cause=needs, note=claim.note), None
    try:
        return check(claim)
    except SourceError as problem:
        return MatrixCheck(claim.name, "unreadable", cause=str(problem), note=claim.note), None
    finally:
        done(_read_of(claim))


def report_of(claims: Claims, checked: Iterable[tuple[Claim, MatrixCheck | None]]) -> MergeReport:
    """The report on what was checked.

    Raises:
        SourceError: no matrix was selected that the adapter changes, or that M has changed.
    """
    rows: list[MatrixCheck] = []
    untouched = 0
    for _, row in checked:
        untouched += row is None
        rows += [row] if row is not None else []
    if not rows:
        raise SourceError(
            f"{claims.adapter} changes none of the {untouched} matrices that were asked for; they equal the base"
        )
    ordered = in_order(rows, [claim.name for claim in claims.claims])
    return MergeReport(ordered, untouched, claims.kind, claims.base, claims.adapter, claims.merged, claims.notes)


def _explained(
    unexplained: Sequence[tuple[Claim, MatrixCheck, Tensor]], claims: Sequence[Claim]
) -> Iterator[tuple[Claim, MatrixCheck]]:
    """Rows with the other weight named whose update is in M, where there is one."""
    shapes = {claim.updates[0].shape for claim, _, _ in unexplained}
    others = [claim for claim in claims if claim.updates and claim.updates[0].shape in shapes] if shapes else []
    best: dict[str, tuple[float, str]] = {}
    for other in others:
        try:
            form = other.updates[0].read()
        except SourceError:
            continue  # its own row says so
        theirs = form.times(causes.probes(form.shape[1]))
        for claim, _, sketch in unexplained:
            if claim.name != other.name:
                best[claim.name] = max(best.get(claim.name, (0.0, "")), (causes.alike(sketch, theirs), other.name))
    for claim, row, _ in unexplained:
        similarity, name = best.get(claim.name, (0.0, ""))
        if causes.is_alike(similarity):
            row = replace(row, verdict="different", cause=f"holds the update of another weight: {name}")
        yield claim, row
