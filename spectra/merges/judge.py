"""The verdict on one matrix: which of the things that a merge can be M is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.merges import causes
from spectra.merges.bounds import Arithmetic, Weights, arithmetics
from spectra.merges.change import Change
from spectra.merges.claims import Claim
from spectra.merges.fit import Fit, cosine, fit, lean, spread
from spectra.merges.replays import blocks, replay_of
from spectra.merges.report import MatrixCheck

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SURE = 5.0  # standard errors
_LEAST_COSINE = 0.5  # of M and W₀, or M − ΔW and W₀: a weight that was tuned keeps more


@dataclass(frozen=True)
class Verdict:
    """What M is, and what speaks for it.

    Attributes:
        word: the verdict.
        replay: the order of operations that gives M.
        cause: what may have gone wrong.
        sketch: of M − W₀ where it is still to be compared with the updates of other weights.
    """

    word: str
    replay: str = ""
    cause: str = ""
    sketch: Tensor | None = None


def check(claim: Claim) -> tuple[MatrixCheck | None, Tensor | None]:
    """The row of one claim, None where the adapter is silent and M = W₀; and a sketch where its cause is open.

    Raises:
        SourceError: a file is gone, changed or broken.
    """
    row = MatrixCheck(claim.name, claim.status, cause=claim.reason, note=claim.note)
    if claim.pair is None or claim.status:
        return row, None
    base, merged = claim.pair.base.read_real(), claim.pair.tuned.read_real()
    if not claim.updates:
        kept = equals(base, merged)
        return (None if kept else replace(row, verdict="untouched but changed", cause=_size(base, merged))), None
    lost = [side for side, weight in (("the base", base), ("the merged weight", merged)) if not _finite(weight)]
    if lost:
        return replace(row, verdict="nonfinite", cause=f"{' and '.join(lost)} holds NaN or infinity"), None
    change = Change(claim.updates, base)
    if not _finite(change.float32()):
        return replace(row, verdict="nonfinite", cause="ΔW holds NaN or infinity"), None
    weights, dtypes = Weights(base, merged, change), kept_in(merged)
    fitted = fit(base, merged, change.sharpest(merged.dtype))
    found = _verdict(weights, fitted, dtypes)
    row = replace(row, scale=fitted.scale, residual=fitted.residual, rounding=fitted.rounding)
    return replace(row, verdict=found.word, replay=found.replay, cause=found.cause), found.sketch


def _verdict(weights: Weights, fitted: Fit, dtypes: Sequence[torch.dtype]) -> Verdict:
    """The verdict, from what needs least to what needs most."""
    as_base = equals(weights.base, weights.merged)
    replay = replay_of(weights.base, weights.merged, weights.change, dtypes)
    if replay and as_base and fitted.change:
        return Verdict("too small to tell", cause="stored in M's type, W₀ + ΔW is W₀")
    if replay:
        return Verdict("exact", replay)
    if not fitted.change:
        return Verdict("different", cause="ΔW is zero, and M is not W₀")
    ways = arithmetics(weights.base, weights.change, dtypes)
    for how in ways:
        if weights.within(how) and _leans_not(weights, fitted, how):
            unsure = weights.within(how, 0.0)
            return Verdict("too small to tell" if unsure else "rounded", how.name)
    if as_base:
        return Verdict("not applied", cause="M = W₀")
    return _nearly(weights, fitted, ways) or _scaled(weights, fitted, ways) or _wrong(weights, fitted, ways)


def _leans_not(weights: Weights, fitted: Fit, how: Arithmetic) -> bool:
    """Whether what is left of M lies across ΔW: wide bounds alone would let another s pass."""
    if how.formed.itemsize > 2:
        return True
    off, error = lean(weights.base, weights.merged, weights.change.float32(), how.kept)
    return off <= max(_SURE * error, how.tolerance)


def _nearly(weights: Weights, fitted: Fit, ways: Sequence[Arithmetic]) -> Verdict | None:
    """Within a rounding or two of every entry, by an order of operations that is not known; or W₀ so near."""
    how = ways[-1]
    error = spread(weights.base, weights.merged, weights.change.float32(), fitted.scale or 0.0)
    off, _ = lean(weights.base, weights.merged, weights.change.float32(), how.kept)
    if weights.near(how) and off <= max(_SURE * error, how.tolerance) and fitted.rest <= 4 * fitted.stored:
        if (fitted.scale or 0.0) <= _SURE * error:
            return Verdict("too small to tell", cause="M is as near to W₀ as to W₀ + ΔW")
        return Verdict("rounded", "within a rounding of each step, in no order that is known")
    if weights.near(how, 0.0) and abs(fitted.scale or 0.0) <= _SURE * error:
        sure = _SURE * error < 1
        return Verdict("not applied" if sure else "too small to tell", cause="M is W₀ up to rounding")
    return None


def _scaled(weights: Weights, fitted: Fit, ways: Sequence[Arithmetic]) -> Verdict | None:
    """W₀ + s·ΔW: first for the s of known mistakes, then for the one that fits best."""
    known = causes.of_scales(weights.change)
    found = fitted.scale or 0.0
    for scale in sorted(known, key=lambda s: abs(s - found)):
        if any(weights.within(how, scale) for how in ways):
            return Verdict("scaled", cause=known[scale])
    update = weights.change.float32()
    for how in ways:
        best = _refined(weights, how, found)
        error = spread(weights.base, weights.merged, update, best)
        if abs(best) > 4 * error and weights.within(how, best, _SURE * error / abs(best) + 1e-6):
            return Verdict("scaled", cause=f"merged with {best:.4g} times the adapter's s")
    return None


def _refined(weights: Weights, how: Arithmetic, scale: float) -> float:
    """The s for which fl(W₀ + s·ΔW) is nearest to M: where ΔW is below the unit in W₀'s last place, s* is not."""
    update = weights.change.float32()
    for _ in range(4):
        off, _ = lean(weights.base, weights.merged, update, how.kept, scale, signed=True)
        scale += off
    return scale


def _wrong(weights: Weights, fitted: Fit, ways: Sequence[Arithmetic]) -> Verdict:
    """Damaged, unrelated or different, with the likeliest cause."""
    scale = fitted.scale or 0.0
    share, how = max(((weights.share(how), how) for how in ways), key=lambda pair: pair[0])
    if share >= 0.5:
        return Verdict("damaged", cause=f"not as merged: {causes.place_of_damage(weights, how)}")
    if causes.applied_again(weights, how):
        return Verdict("different", cause="applied twice: once more on the merged weight")
    if causes.transposed(weights):
        return Verdict("different", cause="the update was transposed")
    update = weights.change.float32()
    error = spread(weights.base, weights.merged, update, scale)
    there = 0.5 < scale < 1.5 and scale > _SURE * error
    coded = causes.dequantised(weights, applied=there or error > 0.1)
    moved = weights.merged.double() - weights.base.double()
    trace = causes.sketch(moved)
    bare = weights.merged.double() - update.double()
    if max(cosine(weights.merged, weights.base), cosine(bare, weights.base)) < _LEAST_COSINE:
        return Verdict("unrelated base", cause="M resembles neither W₀ nor W₀ + ΔW: another base", sketch=trace)
    size = _size(weights.base, bare if there else weights.merged)
    if there:
        why = "merged into a dequantised 4-bit base" if coded else "another base, a quantised one, or noise"
        return Verdict("damaged", cause=f"{why} ({size})")
    if coded:
        return Verdict("different", cause=f"a dequantised 4-bit base ({size})")
    if abs(scale) <= _SURE * error and error < 0.2:
        return Verdict("different", cause=f"not applied, and another base besides ({size})", sketch=trace)
    return Verdict("different", cause=f"another update, or another base ({size})", sketch=trace)


def equals(base: Tensor, merged: Tensor) -> bool:
    """Whether M is W₀, stored in M's type, by way of 16 bits if need be."""
    import torch

    by_way = dict.fromkeys([merged.dtype, torch.bfloat16, torch.float16])
    return any(
        all(torch.equal(base[rows].to(kept).to(merged.dtype), merged[rows]) for rows in blocks(merged))
        for kept in by_way
    )


def kept_in(merged: Tensor) -> list[torch.dtype]:
    """The types in which the sum may have been kept: a narrower one than M's if M holds nothing else."""
    import torch

    narrower = [
        kind for kind in (torch.bfloat16, torch.float16, torch.float32) if kind.itemsize < merged.dtype.itemsize
    ]
    fits = [
        kind
        for kind in narrower
        if all(torch.equal(merged[rows].to(kind).to(merged.dtype), merged[rows]) for rows in blocks(merged))
    ]
    return [*fits[:1], merged.dtype]


def _finite(weight: Tensor) -> bool:
    import torch

    return all(bool(torch.isfinite(weight[rows].sum(dtype=torch.float64))) for rows in blocks(weight))


def _size(base: Tensor, merged: Tensor) -> str:
    """How far a weight is from W₀, in words."""
    norm = float(base.double().norm())
    off = float((merged.double() - base.double()).norm())
    return f"{off / norm:.2g} of ‖W₀‖ off" if norm else f"{off:.2g} off"
