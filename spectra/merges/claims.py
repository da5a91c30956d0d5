"""What the three models claim together: for each weight, that M = W₀ + ΔW, or M = W₀ where the adapter is silent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectra import naming
from spectra.deltas.delta import WeightDelta
from spectra.deltas.recipes import Difference
from spectra.deltas.source import Source
from spectra.errors import SelectionError, SourceError
from spectra.files.dtypes import REAL_FLOATS
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.merges.stored import AsStored
from spectra.models.opening import in_the_same_names, open_any
from spectra.sources import source_of

_NAMED = 3  # of the weights that a note is about
_BLOCKS = 32 * 2**20  # bytes of the rows that are at work at once, in all precisions


@dataclass(frozen=True)
class Claim:
    """One weight, unread: what the adapter does to it, and where W₀ and M are.

    Attributes:
        name: the weight's name in the base.
        updates: every ΔW that acts on it; none where M must equal W₀.
        pair: where W₀ and M are, turned and cut alike; None where there is nothing to compare.
        status: why there is not, a status or a list of the coverage.
        reason: the same in words.
        note: what the numbers stand for.
        saved: whether the pair is not W₀ and M, but a weight that the adapter saved whole and M: the base lacks it.
    """

    name: str
    updates: tuple[WeightDelta, ...] = ()
    pair: Difference | None = None
    status: str = ""
    reason: str = ""
    note: str = ""
    saved: bool = False

    @property
    def bytes(self) -> int:
        """Roughly what checking takes at most: both weights as stored, ΔW in three precisions unless it is factored."""
        if self.pair is None:
            return 0
        stored = self.pair.base.nbytes + self.pair.tuned.nbytes + _BLOCKS
        whole = [delta for delta in self.updates if not delta.factored]
        reading = [getattr(delta.recipe, "reading_bytes", 0) for delta in self.updates]
        return stored + sum(reading) + (16 * self.pair.base.numel if whole else 0)


@dataclass(frozen=True)
class Claims:
    """All claims of three models, and what was noticed while they were opened."""

    claims: tuple[Claim, ...]
    kind: str
    base: str
    adapter: str
    merged: str
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> set[str]:
        """Where the weights lie that are read."""
        pairs = [(claim.pair.base, claim.pair.tuned) for claim in self.claims if claim.pair is not None]
        updates = [delta.refs for claim in self.claims for delta in claim.updates]
        return {part.path for refs in (*pairs, *updates) for ref in refs for part in ref.parts}


def open_claims(
    base: str | Path | Folder,
    adapter: str | Path | Folder,
    merged: str | Path | Folder,
    *,
    layers: str | Sequence[str] | None = None,
    heads: str | int = "mean",
    scale: float | None = None,
) -> Claims:
    """List what must hold, from headers alone; the arguments are those of `spectra.verify_merge`.

    Raises:
        SelectionError: one of the three is not what it should be, or a pattern of `layers` matches nothing.
        SourceError: the adapter changes no matrix; a file is broken.
    """
    for what, given in (("base", base), ("adapter", adapter), ("merged", merged)):
        if not isinstance(given, str | Path | Folder):
            raise SelectionError(
                f"{what} is a {type(given).__name__}: a merge is checked on files, bit for bit; save it and give "
                "its path"
            )
    base_folder, adapter_folder, merged_folder = (open_any(model) for model in (base, adapter, merged))
    updates = source_of(adapter_folder, base_folder, heads=heads, scale=scale)
    if updates.kind == "checkpoint":
        raise SelectionError(
            f"{updates.tuned} holds full weights, not an adapter; pass the adapter as --adapter and the merged model "
            "as --merged"
        )
    pairs = source_of(merged_folder, base_folder)
    if pairs.kind != "checkpoint":
        raise SelectionError(
            f"{pairs.tuned} is an adapter ({pairs.kind}), not merged weights; pass the adapter as --adapter and the "
            "merged model as --merged"
        )
    touched = _of_updates(updates, pairs)
    stored = AsStored(adapter_folder, *in_the_same_names(merged_folder, base_folder))
    lost = [_lost(name, why, stored) for name, why in updates.coverage.tuned_only.items()]
    new = [claim for delta in updates for claim in _new_rows(delta, stored)]
    claims = [*touched.values(), *new, *lost, *_untouched(pairs, touched, stored)]
    if not any(claim.updates or claim.status or claim.saved for claim in claims):
        raise SourceError(
            f"{updates.tuned} ({updates.kind}) changes no matrix of {updates.base}, so there is no merge to verify"
        )
    where = (str(pairs.base), updates.tuned, pairs.tuned)
    return Claims(tuple(_selected(claims, layers)), updates.kind, *where, _notes(updates, pairs, stored))


def _notes(updates: Source, pairs: Source, stored: AsStored) -> tuple[str, ...]:
    lines = [f"adapter: {line}" for line in updates.coverage.warnings]
    lines += [f"merged: {line}" for line in pairs.coverage.warnings]
    lines += [f"merged: {name}: {why}" for name, why in pairs.coverage.shape_mismatch.items()]
    new = [name for name in pairs.coverage.tuned_only if name not in updates.coverage.tuned_only]
    lines += [f"only in the merged model: {_listed(new)}"] if new else []
    missing = [name for name in pairs.coverage.base_only if not stored.is_matrix(name)]
    lines += [f"not in the merged model: {_listed(missing)}"] if missing else []
    moved = stored.changed_vectors(pairs.coverage.skipped)
    if moved:
        lines.append(f"not the base's, and not judged, being no matrices: {_listed(moved)}")
    return tuple(dict.fromkeys(lines))


def _listed(names: Sequence[str]) -> str:
    """The first of the names, and how many there are if there are more.

    >>> _listed(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _of_updates(updates: Source, pairs: Source) -> dict[str, Claim]:
    """name → the claim of each weight that the adapter changes: what it adds to one weight twice is added up."""
    by_name = {pair.name: pair for pair in pairs}
    by_place = {pair.base.ref: pair for pair in pairs if pair.base is not None}
    claims: dict[str, Claim] = {}
    for delta in updates:
        pair = by_name.get(delta.name) or (by_place.get(delta.base.ref) if delta.base else None)
        claim = _claim(delta, pair, pairs)
        before = claims.get(claim.name)
        if before and _both_saved(before, claim):  # two values for one weight of M, which must be both
            for each in (before, claim):
                own = each.updates[0].name
                claims[own] = replace(each, name=own)
        else:
            claims[claim.name] = _joined(before, claim) if before else claim
    return claims


def _both_saved(first: Claim, second: Claim) -> bool:
    """Whether both hold new values of a weight, rather than what is added to it."""
    pairs = [claim.updates for claim in (first, second)]
    return all(updates and isinstance(updates[0].recipe, Difference) for updates in pairs)


def _claim(delta: WeightDelta, pair: WeightDelta | None, pairs: Source) -> Claim:
    name = pair.name if pair else delta.name
    notes = [delta.note] + ([pair.note] if pair else [])
    if pair and pair.name != delta.name:
        notes.append(f"the update of {delta.name}, which is tied to it")
    note = "; ".join(filter(None, notes))
    if delta.recipe is None:
        return Claim(name, status=delta.status, reason=f"the adapter: {delta.reason}", note=note)
    if pair is None:
        reason = pairs.coverage.base_only.get(name) or pairs.coverage.skipped.get(name) or "not in the merged model"
        return Claim(name, status="base_only", reason=reason, note=note)
    claim = _of_pair(pair)
    if claim.pair is not None and delta.shape != pair.shape:
        why = f"the update is {list(delta.shape)}, what both models have {list(pair.shape)}"
        return Claim(name, status="shape_mismatch", reason=why, note=note)
    return Claim(name, (delta,), claim.pair, claim.status, claim.reason, note)


def _joined(first: Claim, second: Claim) -> Claim:
    """Two updates of one weight as one claim; what cannot be done in one of them cannot be done."""
    if first.status or second.status:
        return first if first.status else second
    note = "; ".join(dict.fromkeys(filter(None, (first.note, second.note))))
    return Claim(first.name, (*first.updates, *second.updates), first.pair, note=note)


def _new_rows(delta: WeightDelta, stored: AsStored) -> list[Claim]:
    """A claim on the rows that a weight saved whole has beyond the base's: those of tokens that were added."""
    pair = stored.saved(delta.name) if isinstance(delta.recipe, Difference) else None
    if pair is None or pair.tuned.shape[0] <= delta.shape[0]:
        return []
    first, last = delta.shape[0], pair.tuned.shape[0]
    rows = Difference(pair.tuned.rows(first, last), pair.base.rows(first, last))
    return [Claim(f"{delta.name}[{first}:{last}]", pair=rows, saved=True)]


def _untouched(pairs: Source, touched: Mapping[str, Claim], stored: AsStored) -> list[Claim]:
    """A claim per weight on which the adapter is silent, and one per weight of the base that M lacks."""
    whole = {naming.split_parts(name)[0] for name in touched}
    missing = [
        Claim(name, status="base_only", reason=why)
        for name, why in pairs.coverage.base_only.items()
        if name not in whole and stored.is_matrix(name)
    ]
    silent = [(pair.name, _of_pair(pair)) for pair in pairs if pair.name not in touched]
    raw = {name: stored.pair(name) for name, claim in silent if claim.pair is None}
    return [*(Claim(name, pair=raw[name]) if raw.get(name) else claim for name, claim in silent), *missing]


def _lost(name: str, why: str, stored: AsStored) -> Claim:
    """What the adapter holds and the base does not: a weight that it saved whole is compared with M's."""
    pair = stored.saved(name)
    return Claim(name, pair=pair, saved=True) if pair else Claim(name, status="tuned_only", reason=why)


def _of_pair(pair: WeightDelta) -> Claim:
    """What a weight of the two models gives to compare, or why it gives nothing."""
    if not isinstance(pair.recipe, Difference):
        return Claim(pair.name, status=pair.status, reason=pair.reason)
    codes = _decoded(pair.recipe.tuned)
    if codes:
        return Claim(pair.name, status="unsupported", reason=codes)
    return Claim(pair.name, pair=pair.recipe, note=pair.note)


def _decoded(merged: TensorRef) -> str:
    """Why M's own rounding is not known, "" where it is."""
    if merged.dtype in REAL_FLOATS:
        return ""
    return f"{merged.name} in {merged.path} is stored as {merged.dtype}: verify the merge before it is quantised"


def _selected(claims: Iterable[Claim], layers: str | Sequence[str] | None) -> list[Claim]:
    claims = list(claims)
    if not layers:
        return claims
    wanted = set(naming.select(layers, [claim.name for claim in claims]))
    return [claim for claim in claims if claim.name in wanted]
