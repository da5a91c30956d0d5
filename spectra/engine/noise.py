"""What rounding left in an update, now that its singular values are known.

Which story of how the weights were stored can be true is told by the energy below its edge. Where the update has few
directions, its rounding errors are not independent of it and make values of their own above the edge of independent
ones: the directions that stand out are added to W₀ and rounded again, and what that leaves is no signal either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from spectra.deltas.forms import Dense
from spectra.deltas.rounding import Noise
from spectra.engine.flips import SINGLE, top_values, top_vectors

_MOST = 1.35  # of its energy that may be found below a story's edge before another rounding is assumed
_EXACT = 1.15  # within which the energy has to fit where nothing else suggests a story
_FEWEST = 1024  # entries, without which an energy may be chance
_WAS, _WAS_NOT = 0.4, 0.6  # of a second rounding; in real weights .4 to 1.5 where there was one, -.8 to .5 where none
_CLEAR = 0.75  # standard error of that share which still tells
_SETTLED, _MOST_STEPS = 0.98, 20  # of the energy, which is 1 % of the edge
_LOST = 1e-12  # of ‖ΔW‖²: an energy that small drowns in the rounding of the sums
_STANDS_OUT = 0.3  # of σ₁: what rounding made of the largest of one or two directions stayed below .2
_FEW = 16  # directions; what rounding makes of more is below independent errors
_MOST_ARTEFACTS = 64  # values above the edge, beyond which it is no matter of a few directions
_FITS, _FEWEST_FITS = 0.01, 3  # the change of its values at which an update fits, after so many steps
_MOST_FITS, _MOST_FITS_OF_ONE = 24, 15
_SLACK = 1.05  # over what comes back of the errors: measured 0 to 3 % less, and the largest value varies by 1 %
_MOSTLY_UNMOVED = 0.9  # of the entries: artefacts are as large as the update then
_SINGLE_RANGE = 1e-15, 1e15  # of values whose squares float32 holds, with room
_FEWEST_HIDE = 3  # directions, from which on they hide one another's errors


def plausible_noise(stories: Sequence[Noise], S: np.ndarray, norm: float, shape: tuple[int, ...]) -> Noise | None:
    r"""The story that the spectrum bears out, with as much noise as there is room for.

    Errors that are independent of the update leave their energy behind: what is below the edge, ‖ΔW‖² − Σσ² over the
    k values above it, is that of the errors outside k directions of either side, E·(1 − k/m)(1 − k/n), and what the
    update has there. Where much more is found, another rounding took place, or the update reaches below the edge: the
    next story is taken, so that in doubt a value is not called signal. Where less is found, most of the entries did
    not move and have no error but the update that they lack: edge and energy are lowered to what is there.

    Args:
        stories: the one with the most noise first.
        S: singular values, descending, all or the top ones.
        norm: ‖ΔW‖_F.
        shape: (m, n).

    Example:
        >>> stories = (Noise(4.0, 32.0, "two roundings"), Noise(2.8, 16.0, "one rounding"))
        >>> found = plausible_noise(stories, np.array([9.0, 1.6, 1.6, 1.6, 1.6]), 91.24**0.5, (5, 5))
        >>> found.said
        'one rounding'
    """
    if not stories:
        return None
    story = _chosen(stories, S, norm, shape)
    for _ in range(_MOST_STEPS if story.energy > _LOST * norm**2 else 0):
        share = _found(story, S, norm, shape)
        if share >= _SETTLED:
            break
        story = story.scaled(math.sqrt(share))
    return story


def _chosen(stories: Sequence[Noise], S: np.ndarray, norm: float, shape: tuple[int, ...]) -> Noise:
    """The one with the least noise that leaves no energy unexplained, or else the one with the most."""
    most, fewest = stories[0], stories[-1]
    if most.far_fetched and (math.prod(shape) < _FEWEST or fewest.energy < _LOST * norm**2):
        return fewest  # of few entries, or of sums that have drowned it, the energy tells nothing
    for story in reversed(stories):
        if _found(story, S, norm, shape) <= _MOST:
            return story
    seen = most.jump and most.jump()
    if seen is not None and seen.share > _WAS and seen.error < _CLEAR:
        return most
    if seen is not None and seen.share + seen.error < _WAS_NOT:
        return fewest
    fits = 1 / _EXACT <= _found(most, S, norm, shape) <= _EXACT
    if fits:
        return most
    return fewest if most.far_fetched else replace(most, said=most.said_in_doubt)


def _found(story: Noise, S: np.ndarray, norm: float, shape: tuple[int, ...]) -> float:
    """The energy below the story's edge, relative to what the story expects there."""
    above = S[story.edge < S]
    k = len(above)
    expected = story.energy * (1 - k / shape[0]) * (1 - k / shape[1])
    left = max(norm**2 - float(np.square(above).sum()), 0.0)
    return left / expected if expected > 0 else math.inf


def with_artefacts(noise: Noise, form: Dense, S: np.ndarray) -> Noise:
    r"""The noise with its edge where rounding an update of the directions that stand out puts it.

    Rounding to a grid maps an update of rank one, u vᵀ, entry by entry to a function of it, whose odd powers are of
    rank one each: they stand above independent errors, the more the larger the matrix. So an update of k directions is
    sought that, rounded on the same base, leaves the k largest values as they are stored; the (k + 1)-th value that it
    leaves is rounding alone. As long as more stored values than k are above it, they count to k, too.

    Args:
        noise: what the spectrum does not refute.
        form: ΔW.
        S: its values.
    """
    if form.rounded is None or noise.grid is None or not len(S):
        return noise
    count, found = int((noise.edge < S).sum()), noise
    k = int((max(_STANDS_OUT * S[0], noise.edge) < S).sum())
    unmoved = (form.unchanged or 0.0) > _MOSTLY_UNMOVED
    k = min(k, 1) if unmoved else k
    tries = _MOST_FITS
    while tries > 0 and 0 < k < count <= _MOST_ARTEFACTS and k <= _FEW:
        again, used = _replayed(noise, form, k, min(tries, _MOST_FITS_OF_ONE), float(S[0]))
        tries -= used
        edge = _SLACK * float(again[k]) / min(1.0, float((again[:k] / S[:k]).min()))
        if not math.isfinite(edge):
            break
        said = f"{noise.said}, whose errors follow an update of few directions" if edge > noise.edge else noise.said
        found = replace(noise, edge=edge, said=said)
        above = int((edge < S[:count]).sum())
        if above <= k:
            break
        k = k + 1 if unmoved and k < _FEWEST_HIDE else above
    return found


def _replayed(noise: Noise, form: Dense, k: int, tries: int, largest: float) -> tuple[np.ndarray, int]:
    """The k + 1 largest values that rounding leaves of the update of k directions of which it leaves the stored ones.

    X ← the top k of X + ΔW − (what rounding leaves of X), from the top k of ΔW, until X changes no more; in float32
    where the edge is far above what that loses.
    """
    assert form.rounded is not None
    least, most = _SINGLE_RANGE
    single = noise.edge > max(SINGLE * largest, least) and largest < most
    matrix = form.matrix.to(torch.float32) if single else form.matrix
    U, S, Vh = top_vectors(matrix, k)
    fits = 0
    while fits < tries:
        fits += 1
        left, before = form.rounded(noise, (U * S) @ Vh), S
        U, S, Vh = top_vectors(left.neg_().add_(matrix).addmm_(U * S, Vh), k, Vh)
        if fits > _FEWEST_FITS and float((S / before - 1).abs().max()) < _FITS:
            break
    return top_values(form.rounded(noise, (U * S) @ Vh), k + 1), fits
