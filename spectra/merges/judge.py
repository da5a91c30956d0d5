"""The verdict on one matrix: which of the things that a merge can be M is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.lazy import torch
from spectra.merges import causes
from spectra.merges.bounds import Arithmetic, arithmetics, near, reach, share, within, wrong_entries
from spectra.merges.change import Change
from spectra.merges.claims import Claim
from spectra.merges.fit import Fit, fit, lean, similarity, spread
from spectra.merges.replays import SUM, replay_of
from spectra.merges.report import MatrixCheck
from spectra.merges.weights import Weights, blocks, equals, kept_in

if TYPE_CHECKING:
    from torch import Tensor

_SURE = 5.0  # standard errors
_SHARP = 0.2  # a standard error of s* with which an update that is there would show
_MOST = 0.5  # of the entries that tell
_LEAST_COSINE = 0.5  # of M and W₀, or M − ΔW and W₀: a weight that was tuned keeps more
_REFINEMENTS = 4
_DROWNED = "stored in M's type, W₀ + ΔW is W₀ but for a few entries at most"


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
    if claim.pair is None:
        return row, None
    base, merged = _matrix(claim.pair.base.read()), _matrix(claim.pair.tuned.read())
    if not claim.updates:
        return _kept(claim, row, base, merged), None
    weights = Weights(base, merged, Change(claim.updates, base), kept_in(merged))
    fitted = fit(weights)
    if not fitted.is_finite:
        return replace(row, verdict="nonfinite", cause=f"{_nonfinite(weights)} holds NaN or infinity"), None
    verdict = verdict_on(weights, fitted)
    scale = 0.0 if equals(weights.base, weights.merged) and fitted.change else fitted.scale  # sums leave 1e-16 of it
    row = replace(row, scale=scale, residual=fitted.residual, rounding=fitted.rounding)
    return replace(row, verdict=verdict.word, replay=verdict.replay, cause=verdict.cause), verdict.sketch


def _matrix(weight: Tensor) -> Tensor:
    """A weight as rows, whatever its axes are."""
    return weight if weight.ndim == 2 else weight.reshape(weight.shape[0] if weight.ndim else 1, -1)


def _kept(claim: Claim, row: MatrixCheck, base: Tensor, merged: Tensor) -> MatrixCheck | None:
    """The row of a weight that must be as it was, or as the adapter saved it; None for the base's own."""
    if equals(base, merged):
        return replace(row, verdict="exact", replay="as the adapter saved it") if claim.saved else None
    if claim.saved:
        return replace(row, verdict="different", cause="not what the adapter saved whole")
    return replace(row, verdict="untouched but changed", cause=_size(base, merged))


def verdict_on(weights: Weights, fitted: Fit) -> Verdict:
    """The verdict, from what needs least to what needs most.

    Args:
        weights: the matrix.
        found: its fit.
    """
    replay = SUM if fitted.bitwise else replay_of(weights)
    if replay and fitted.change and not weights.tells():
        return Verdict("too small to tell", cause=_DROWNED)
    if replay:
        return Verdict("exact", replay)
    if not fitted.change:
        return Verdict("different", cause="ΔW is zero, and M is not W₀")
    ways = arithmetics(weights)
    for how in ways:
        if within(weights, how) and _leans_not(weights, how):
            unsure = within(weights, how, 0.0) or not weights.tells()
            return Verdict("too small to tell", cause=_DROWNED) if unsure else Verdict("rounded", how.name)
    if equals(weights.base, weights.merged):
        return Verdict("not applied", cause="M = W₀")
    return _nearly(weights, fitted, ways) or _scaled(weights, fitted, ways) or _wrong(weights, fitted, ways)


def _leans_not(weights: Weights, how: Arithmetic) -> bool:
    """Whether what is left of M lies across ΔW: wide bounds alone would let another s pass."""
    if how.formed.itemsize > 2:
        return True
    off, error = lean(weights, how)
    return abs(off) <= max(_SURE * error, how.tolerance) or abs(off) <= reach(weights, how)


def _nearly(weights: Weights, fitted: Fit, ways: Sequence[Arithmetic]) -> Verdict | None:
    """Within a rounding or two of every entry, by an order of operations that is not known; or W₀ so near."""
    scale = fitted.scale or 0.0
    error = spread(weights, scale)
    for how in ways:
        off, _ = lean(weights, how)
        if fitted.rest > 4 * fitted.stored or not near(weights, how) or abs(off) > max(_SURE * error, how.tolerance):
            continue
        if scale <= _SURE * error:
            return Verdict("too small to tell", cause="M is as near to W₀ as to W₀ + ΔW")
        return Verdict("rounded", "within a rounding of each step, in no order that is known")
    how = ways[-1]
    if near(weights, how, 0.0) and abs(scale) <= _SURE * error:
        sure = _SURE * error < 1
        return Verdict("not applied" if sure else "too small to tell", cause="M is W₀ up to rounding")
    return None


def _scaled(weights: Weights, found: Fit, ways: Sequence[Arithmetic]) -> Verdict | None:
    """W₀ + s·ΔW: first for the s of known mistakes, then for the one that fits best."""
    known, fitted = causes.of_scales(weights.change), found.scale or 0.0
    for scale in sorted(known, key=lambda s: abs(s - fitted)):
        if any(within(weights, how, scale) for how in ways):
            return Verdict("scaled", cause=known[scale])
    for how in ways:
        best = _refined(weights, how, fitted)
        error = spread(weights, best)
        if abs(best) > _SURE * error and within(weights, how, best, _SURE * error / abs(best) + 1e-6):
            return Verdict("scaled", cause=f"merged with {best:.4g} times the adapter's s")
    return None


def _refined(weights: Weights, how: Arithmetic, scale: float) -> float:
    """The s for which fl(W₀ + s·ΔW) is nearest to M: where ΔW is below the unit in W₀'s last place, s* is not."""
    for _ in range(_REFINEMENTS):
        scale += lean(weights, how, scale)[0]
    return scale


def _wrong(weights: Weights, fitted: Fit, ways: Sequence[Arithmetic]) -> Verdict:
    """Damaged, unrelated or different, with the likeliest cause."""
    shares = [share(weights, how) for how in ways]
    right, how = max(zip(shares, ways, strict=True), key=lambda pair: pair[0])
    place = ""
    if right >= _MOST:
        likely = [way for way, part in zip(ways, shares, strict=True) if part >= _MOST]
        how = min(likely, key=lambda way: wrong_entries(weights, way))
        place = causes.place_of_damage(weights, how)
    if place:
        return Verdict("damaged", cause=f"not as merged: {place}")
    if causes.applied_again(weights, how):
        return Verdict("different", cause="applied twice: once more on the merged weight")
    if causes.transposed(weights):
        return Verdict("different", cause="the update was transposed")
    kin = max(similarity(weights), similarity(weights, of_update=True))
    if right < _MOST and kin < _LEAST_COSINE:
        why = "M resembles neither W₀ nor W₀ + ΔW: another base"
        return Verdict("unrelated base", cause=why, sketch=causes.sketch(weights))
    scale = fitted.scale or 0.0
    error = spread(weights, scale)
    if right >= _MOST or (0.5 < scale < 1.5 and scale > _SURE * error):
        coded = causes.dequantised(weights, applied=True)
        why = "merged into a dequantised 4-bit base" if coded else "another base, a quantised one, or noise"
        return Verdict("damaged", cause=f"{why} ({_size(weights.base, weights.merged, weights.change)})")
    return _different(weights, scale, error)


def _different(weights: Weights, scale: float, error: float) -> Verdict:
    """Not the update, as far as can be told: what it may be instead."""
    if any(causes.dequantised(weights, applied) for applied in (False, True)):
        why = "a dequantised 4-bit base"
    elif abs(scale) <= _SURE * error and error < _SHARP:
        why = "not applied, and another base besides"
    else:
        why = "another update, or another base"
    cause = f"{why} ({_size(weights.base, weights.merged)})"
    return Verdict("different", cause=cause, sketch=causes.sketch(weights))


def _nonfinite(weights: Weights) -> str:
    """Which of the three is not finite."""
    sides = {"the base": weights.base, "the merged weight": weights.merged, "ΔW": weights.change.float32()}
    return " and ".join(side for side, matrix in sides.items() if not bool(torch.isfinite(matrix).all()))


def _size(base: Tensor, merged: Tensor, change: Change | None = None) -> str:
    """How far M, less ΔW if one is given, is from W₀, in words."""
    norm = off = 0.0
    for rows in blocks(merged):
        rest = merged[rows].double() - base[rows].double()
        rest = rest if change is None else rest - change.float32(rows)
        norm, off = norm + float(base[rows].double().square().sum()), off + float(rest.square().sum())
    return f"{(off / norm) ** 0.5:.2g} of ‖W₀‖ off" if norm else f"{off**0.5:.2g} off"
