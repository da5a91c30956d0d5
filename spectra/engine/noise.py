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
from torch import Tensor

from spectra.deltas.forms import Dense
from spectra.deltas.rounding import Noise
from spectra.deltas.thin import times
from spectra.engine.solvers import dense

_MOST = 1.35  # of its energy that may be found below a story's edge before another rounding is assumed
_EXACT = 1.15  # within which the energy has to fit where nothing else suggests a story
_SETTLED, _MOST_STEPS = 0.98, 20  # of the energy, which is 1 % of the edge
_LOST = 1e-12  # of ‖ΔW‖²: an energy that small drowns in the rounding of the sums
_STANDS_OUT = 0.3  # of σ₁: what rounding made of the largest of one or two directions stayed below .2
_FEW = 16  # directions; more of them hide one another's errors
_MINOR = 0.1  # energy of what may be artefacts, relative to that of the directions that stand out
_MOST_ARTEFACTS = 64  # values above the edge, beyond which it is no matter of a few directions
_MOST_REPLAYS = 4
_SLACK = 1.12  # the found directions hold some of the errors, and less is left of them: measured 1.02 to 1.1
_SPARE, _STEPS = 8, 6  # columns and steps of the subspace iteration


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
    for story in reversed(stories):
        if _found(story, S, norm, shape) <= _MOST:
            return story
    if not stories[0].far_fetched:
        return stories[0]
    share = _found(stories[0], S, norm, shape)
    return stories[0] if 1 / _EXACT <= share <= _EXACT else stories[-1]


def _found(story: Noise, S: np.ndarray, norm: float, shape: tuple[int, ...]) -> float:
    """The energy below the story's edge, relative to what the story expects there."""
    above = S[story.edge < S]
    k = len(above)
    expected = story.energy * (1 - k / shape[0]) * (1 - k / shape[1])
    left = max(norm**2 - float(np.square(above).sum()), 0.0)
    return left / expected if expected > 0 else math.inf


def with_artefacts(noise: Noise, form: Dense, S: np.ndarray, U: Tensor | None, Vh: Tensor | None) -> Noise:
    r"""The noise with its edge raised over what rounding makes of the update's own few directions.

    Rounding to a grid maps an update of rank one, u vᵀ, entry by entry to a function of it, whose odd powers are of
    rank one each: they stand above independent errors, the more the larger the matrix. So the k values that stand out,
    with their vectors, are rounded again on the same base; the (k + 1)-th value of what that leaves is the edge. As
    long as more values than k are above it, they count to k, too.

    Args:
        noise: what the spectrum does not refute.
        form: ΔW.
        S: its values.
        U: left vectors, or None.
        Vh: right vectors, or None.
    """
    if form.rounded is None or noise.grid is None or not len(S):
        return noise
    count, energy, raised = int((noise.edge < S).sum()), np.square(S), noise
    k = int((max(_STANDS_OUT * S[0], noise.edge) < S).sum())
    for _ in range(_MOST_REPLAYS):
        if not (0 < k < count <= _MOST_ARTEFACTS and k <= _FEW and energy[k:count].sum() < _MINOR * energy[:k].sum()):
            break
        if U is None or Vh is None or U.shape[1] < k:
            U, Vh = _top(form, k)
        signal = (U[:, :k] * torch.as_tensor(S[:k]).to(U)) @ Vh[:k]
        again = dense.gram_values(form.rounded(noise, signal)).cpu().numpy()
        if raised is not noise and again[k - 1] > S[k - 1]:
            break  # rounding takes from a direction of the update, and makes one of its own a second time
        edge = max(noise.edge, _SLACK * float(again[k] * S[0] / again[0]))
        above = int((edge < S).sum())
        if edge > noise.edge:
            raised = replace(noise, edge=edge, said=f"{noise.said}, whose errors follow an update of few directions")
        if above <= k:
            break
        k = above
    return raised


def _top(form: Dense, k: int) -> tuple[Tensor, Tensor]:
    """The vectors of the top k values, which stand out, to the percent that is needed: subspace iteration."""
    generator = torch.Generator().manual_seed(k)
    start = torch.randn(form.shape[1], k + _SPARE, generator=generator, dtype=torch.float64)
    block = form.times(start.to(form.matrix.device))
    for _ in range(_STEPS):
        block = form.times(form.T.times(torch.linalg.qr(block).Q))
    basis = torch.linalg.qr(block).Q
    u, _, vh = torch.linalg.svd(form.T.times(basis).mT, full_matrices=False)
    return times(basis, u[:, :k]), vh[:k]
