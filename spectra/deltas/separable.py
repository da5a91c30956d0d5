"""Where the singular values of independent entries end, whose variances differ from row to row and column to column."""

from __future__ import annotations

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
    return float(separable_edges(rows[None], columns[None])[0])


def separable_edges(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The same of several matrices of one shape, (b,), from their sums (b, m) and (b, n)."""
    found = np.zeros(len(rows))
    there = np.flatnonzero(rows.sum(1) > 0)
    if len(there):
        rows, columns = rows[there], columns[there]
        most = rows.max(1) / rows.sum(1) * columns.max(1)
        least = _least(rows / rows.max(1, keepdims=True), columns / columns.max(1, keepdims=True))
        found[there] = np.sqrt(least * most)
    return found


def _least(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The least λ over w in _T, u from a table over t: of every eighth w, then of those around its minimum.

    λ has one minimum; were it found at an end of what is looked at, all of _T would be.
    """
    some = np.broadcast_to(_SOME, (len(a), len(_SOME)))
    reach_a, reach_b = _reach(a, some), _reach(b, some)
    best = _ratios(some, reach_a, some, reach_b).argmin(1)
    first, last = np.maximum(best - 2, 0), np.minimum(best + 2, len(_SOME) - 1)
    ends = zip(reach_b, reach_a[np.arange(len(a)), first], reach_a[np.arange(len(a)), last], strict=True)
    low, high = np.array([reach.searchsorted((from_, to)) for reach, from_, to in ends]).T
    around = _stretches(_SOME[first], _SOME[last])
    table = _stretches(_SOME[np.maximum(low - 1, 0)], _SOME[np.minimum(high, len(_SOME) - 1)])
    found = _ratios(around, _reach(a, around), table, _reach(b, table))
    place = around[np.arange(len(a)), found.argmin(1)]
    is_end = ((place == around[:, 0]) & (place > 0)) | ((place == around[:, -1]) & (place < len(_T) - 1))
    for i in np.flatnonzero(is_end):
        all_of = np.arange(len(_T))[None]
        found[i] = _ratios(all_of, _reach(a[i : i + 1], all_of), all_of, _reach(b[i : i + 1], all_of)).min()
    least: np.ndarray = found.min(1)
    return least


def _stretches(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Places in _T from a first to a last one, a row each; the shorter ones stay at their last."""
    return np.minimum(first[:, None] + np.arange(int((last - first).max()) + 1), last[:, None])


def _reach(a: np.ndarray, places: np.ndarray) -> np.ndarray:
    """w·A(w) at places of _T, row by row."""
    reach: np.ndarray = _T[places] * _resolvent(a, _T[places])
    return reach


def _ratios(around: np.ndarray, reach_a: np.ndarray, table: np.ndarray, reach_b: np.ndarray) -> np.ndarray:
    """A(w)/u(w) where w·A(w), `reach_a`, is in the table of u·B(u), `reach_b`; ∞ beyond. Places of _T, row by row."""
    sought, known, u = np.log(reach_a), np.log(reach_b), np.log(_T[table])
    found = np.exp([np.interp(*one) for one in zip(sought, known, u, strict=True)])
    return np.where(reach_a <= reach_b[:, -1:], reach_a / _T[around] / found, np.inf)


def _resolvent(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Σᵢ aᵢ/(1 − w aᵢ) for every w, row by row."""
    total = np.zeros(w.shape)
    for start in range(0, a.shape[1], _MOST_TERMS):
        some = a[:, start : start + _MOST_TERMS, None]
        terms = some * -w[:, None]  # one array for all steps: fresh memory is what takes the time here
        terms += 1
        np.divide(some, terms, out=terms)
        total += terms.sum(1)
    return total
