"""Where the singular values of independent entries end, whose variances differ from row to row and column to column."""

from __future__ import annotations

import math

import numpy as np

_GRID, _EVERY = 400, 8
# Dense at both ends: the minimum lies near 1 where one row or column dominates.
_T = 0.5 - 0.5 * np.cos(np.pi * (np.arange(1, _GRID) / _GRID))
_SOME = np.append(np.arange(0, len(_T) - 1, _EVERY), len(_T) - 1)
_MOST_TERMS = 4096  # rows or columns at once, 13 MB


def separable_edge(rows: np.ndarray, columns: np.ndarray) -> float:
    r"""The largest singular value of independent entries of mean 0 whose variances have these sums.

    With variances aᵢbⱼ the edge is the least λ(w) over 0 < w < 1/max a, where
    λ = A(w)/u, A(w) = Σ aᵢ/(1 − w aᵢ), B(u) = Σ bⱼ/(1 − u bⱼ) and u solves w·A(w) = u·B(u); σ = √λ.
    For equal variances v this is √v·(√m + √n).

    Args:
        rows: Σⱼ of the variances, (m,).
        columns: Σᵢ of the variances, (n,).

    Example:
        >>> round(separable_edge(np.full(400, 900.0), np.full(900, 400.0)), 2)
        50.0

    Reference: Paul & Silverstein 2009 (separable covariance, no eigenvalues outside the limiting support).
    """
    total = rows.sum()
    if not total > 0:
        return 0.0
    a, b = rows / rows.max(), columns / columns.max()
    return math.sqrt(_least(a, b) * rows.max() * columns.max() / total)


def _least(a: np.ndarray, b: np.ndarray) -> float:
    """The least λ over w in _T, u from a table over t: of every eighth w, then of those around its minimum.

    λ has one minimum; were it found at an end of what is looked at, all of _T would be.
    """
    t, some = _T, _SOME
    reach_a, reach_b = (t[some] * _resolvent(side, t[some]) for side in (a, b))
    best = int(_ratios(t[some], reach_a, t[some], reach_b).argmin())
    first, last = max(best - 2, 0), min(best + 2, len(some) - 1)
    around = np.arange(some[first], some[last] + 1)
    low, high = np.searchsorted(reach_b, reach_a[[first, last]])
    table = np.arange(some[max(low - 1, 0)], some[min(high, len(some) - 1)] + 1)
    found = _ratios(t[around], t[around] * _resolvent(a, t[around]), t[table], t[table] * _resolvent(b, t[table]))
    place = int(found.argmin())
    if (place == 0 and around[0] > 0) or (place == len(around) - 1 and around[-1] < len(t) - 1):
        found = _ratios(t, t * _resolvent(a, t), t, t * _resolvent(b, t))
    return float(found.min())


def _ratios(w: np.ndarray, reach_a: np.ndarray, u: np.ndarray, reach_b: np.ndarray) -> np.ndarray:
    """A(w)/u(w) where w·A(w), `reach_a`, is in the table of u·B(u), `reach_b`; ∞ beyond."""
    found = np.exp(np.interp(np.log(reach_a), np.log(reach_b), np.log(u)))
    return np.where(reach_a <= reach_b[-1], reach_a / w / found, np.inf)


def _resolvent(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Σ aᵢ/(1 − w aᵢ) for every w."""
    total = np.zeros(len(w))
    for start in range(0, len(a), _MOST_TERMS):
        some = a[start : start + _MOST_TERMS]
        terms = np.multiply.outer(some, -w)  # one array for all steps: fresh memory is what takes the time here
        terms += 1
        np.divide(some[:, None], terms, out=terms)
        total += terms.sum(0)
    return total
