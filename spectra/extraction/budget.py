"""The ranks that lose least within a budget of parameters: a knapsack whose items of one matrix come in order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MOST_WORK = 50_000_000  # sums that an exact answer may take: a fraction of a second


def best_ranks(gains: Sequence[np.ndarray], costs: Sequence[int], budget: int) -> list[int]:
    r"""Ranks r_j that minimise Σ_j Σ_{i>r_j} σ_{ji}² subject to Σ_j r_j·c_j ≤ budget, c_j = m_j + n_j.

    Exact where that takes little time. Else in turn: one more triplet of matrix j takes σ²/c_j per parameter off the
    sum, and since each matrix' σ descend, taking the largest of all never needs a triplet before the one in front of
    it. That is optimal up to the last step, and what is left of the budget goes to the triplets that still fit.

    Args:
        gains: σ² of each matrix, descending.
        costs: parameters of one rank of each.
        budget: how many all of them may have.

    Example:
        >>> best_ranks([np.array([4.0, 1.0]), np.array([9.0])], [2, 5], 6)
        [0, 1]
    """
    classes = {cost: [place for place, own in enumerate(costs) if own == cost] for cost in sorted(set(costs))}
    unit = math.gcd(*classes) if classes else 1
    work = sum((budget // cost + 1) * (budget // unit + 1) for cost in classes)
    if work > _MOST_WORK:
        return _in_turn_until_spent(gains, costs, budget)
    totals = [_kept(np.concatenate([gains[place] for place in places])) for places in classes.values()]
    ranks = [0] * len(gains)
    for (cost, places), count in zip(classes.items(), _counts(totals, list(classes), budget, unit), strict=True):
        for place, rank in zip(places, _first([gains[place] for place in places], cost, count), strict=True):
            ranks[place] = rank
    return ranks


def _kept(gains: np.ndarray) -> np.ndarray:
    """What the best 0, 1, 2, … triplets of matrices of equal cost keep together."""
    return np.concatenate([np.zeros(1), np.cumsum(np.sort(gains)[::-1])])


def _counts(totals: Sequence[np.ndarray], costs: Sequence[int], budget: int, unit: int) -> list[int]:
    """How many triplets of each cost to take, by dynamic programming over what is spent.

    Reference: Bellman & Dreyfus 1962, "Applied Dynamic Programming" (the cargo-loading problem).
    """
    size = budget // unit
    best = np.zeros(size + 1)
    taken: list[np.ndarray] = []
    for total, cost in zip(totals, costs, strict=True):
        step, new, counts = cost // unit, best.copy(), np.zeros(size + 1, dtype=np.int64)
        for count in range(1, min(len(total) - 1, size // step) + 1):
            start = count * step
            with_count = best[: size + 1 - start] + total[count]
            better = with_count > new[start:]
            new[start:][better] = with_count[better]
            counts[start:][better] = count
        best = new
        taken.append(counts)
    chosen: list[int] = []
    for counts, cost in zip(reversed(taken), reversed(costs), strict=True):
        chosen.append(int(counts[size]))
        size -= chosen[-1] * (cost // unit)
    return chosen[::-1]


def _first(gains: Sequence[np.ndarray], cost: int, count: int) -> list[int]:
    """The ranks of matrices of equal cost that have the best triplets, so many together."""
    owners, _, _ = in_turn(gains, [cost] * len(gains))
    ranks: list[int] = np.bincount(owners[:count], minlength=len(gains)).tolist()
    return ranks


def _in_turn_until_spent(gains: Sequence[np.ndarray], costs: Sequence[int], budget: int) -> list[int]:
    owners, spent, _ = in_turn(gains, costs)
    ranks: list[int] = np.bincount(
        owners[: np.searchsorted(spent, budget, side="right")], minlength=len(gains)
    ).tolist()
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    while True:
        fitting = [
            (gain[rank] / cost, -place)
            for place, (gain, rank, cost) in enumerate(zip(gains, ranks, costs, strict=True))
            if rank < len(gain) and cost <= left
        ]
        if not fitting:
            return ranks
        place = -max(fitting)[1]
        ranks[place] += 1
        left -= costs[place]


def in_turn(gains: Sequence[np.ndarray], costs: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All triplets, the best per parameter first: whose each is, and what it and those before it cost and keep."""
    owners = np.repeat(np.arange(len(gains)), [len(gain) for gain in gains])
    energies = np.concatenate([*gains, np.zeros(0)])
    prices = np.asarray(costs, dtype=np.int64)[owners]
    order = np.argsort(-energies / prices, kind="stable")
    return owners[order], np.cumsum(prices[order]), np.cumsum(energies[order])
