"""Several updates, two by two: φ of every pair, pooled by role and layer, as one square, in clustered order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from spectra import naming
from spectra.errors import SelectionError
from spectra.metrics.similarity import Side
from spectra.results.similarities import Compared, NotCompared

if TYPE_CHECKING:
    import pandas as pd

    from spectra.results.tables import Row

COLUMNS = ("a", "b", "name", "side", "k_used", "phi", "chance", "other", "note")
Pooling = Literal["all", "role", "layer", "matrix"]


@dataclass(frozen=True, eq=False)
class Pair:
    """One matrix of two of several updates.

    Attributes:
        a: what the first is called.
        b: what the second is called.
        outcome: its similarity on one side, or why there is none.
    """

    a: str
    b: str
    outcome: Compared

    @property
    def reason(self) -> str:
        """Why there is no similarity; "" where there is one."""
        return self.outcome.reason if isinstance(self.outcome, NotCompared) else ""

    @property
    def status(self) -> str:
        """`ok`, or that of a matrix without a similarity."""
        return self.outcome.status if isinstance(self.outcome, NotCompared) else "ok"

    @property
    def one_sided(self) -> bool:
        """Whether only one of the two has the matrix, which is no fault."""
        return self.status == "one_sided"


@dataclass(frozen=True, eq=False)
class _Kept:
    """What stays of a similarity: φ(k, k) for k = 1 … k_used, and chance, which is k/d."""

    a: str
    b: str
    name: str
    other: str
    role: str
    layer: int | None
    side: Side
    diagonal: np.ndarray
    chance_of_one: float
    note: str


_GROUPS: dict[Pooling, Callable[[_Kept], tuple[str, str | int | None]]] = {
    "all": lambda kept: ("group", "all"),
    "role": lambda kept: ("role", kept.role),
    "layer": lambda kept: ("layer", kept.layer),
    "matrix": lambda kept: ("name", kept.name),
}


class Pairs:
    """The similarities of all pairs of several updates: of each φ(k, k), k = 1 … k_used, is kept and not the grid.

    Args:
        pairs: what `compare_all` gives.
        labels: the updates in order; None for the order in which they come.

    Attributes:
        labels: what the updates are called, in order.
        not_compared: the pairs of matrices that have no similarity.

    Example:
        >>> from spectra.metrics.similarity import SubspaceSimilarity
        >>> one = np.ones((1, 1))
        >>> phi = {("a", "b"): 0.9, ("a", "c"): 0.1, ("b", "c"): 0.3}
        >>> pairs = Pairs(
        ...     Pair(*names, SubspaceSimilarity("layers.0.v_proj.weight", "left", 1, one * value, one / 4, np.zeros(1)))
        ...     for names, value in phi.items()
        ... )
        >>> pairs.square().tolist()
        [[1.0, 0.9, 0.1], [0.9, 1.0, 0.3], [0.1, 0.3, 1.0]]
        >>> pairs.pooled("role")[0]
        {'a': 'a', 'b': 'b', 'role': 'v_proj', 'side': 'left', 'matrices': 1, 'k_used': 1, 'phi': 0.9, 'chance': 0.25}
    """

    def __init__(self, pairs: Iterable[Pair] = (), labels: Sequence[str] | None = None) -> None:
        self.not_compared: list[Pair] = []
        self._labels = dict.fromkeys(labels or ())
        self._kept: list[_Kept] = []
        for pair in pairs:
            self.add(pair)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the updates are called, in order."""
        return tuple(self._labels)

    @property
    def one_sided(self) -> list[Pair]:
        """The matrices that only one update of a pair has."""
        return [pair for pair in self.not_compared if pair.one_sided]

    @property
    def unchanged(self) -> dict[str, list[str]]:
        """Update → the matrices that it leaves exactly as they are, which are in none of its pairs."""
        found: dict[str, dict[str, None]] = {}
        for pair in self.not_compared:
            if isinstance(pair.outcome, NotCompared):
                for which in pair.outcome.unchanged:
                    found.setdefault(pair.a if which == "first" else pair.b, {})[pair.outcome.name] = None
        return {label: list(found[label]) for label in self.labels if label in found}

    @property
    def failed(self) -> list[Pair]:
        """The matrices that both updates of a pair change and that could not be compared."""
        return [pair for pair in self.not_compared if pair.status == "failed"]

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that were compared, left first."""
        return tuple(sorted({kept.side for kept in self._kept}))

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        count = len(self.labels)
        return f"Pairs({count} updates, {len(self)} similarities, {len(self.not_compared)} not compared)"

    def add(self, pair: Pair) -> None:
        """Take in one more."""
        self._labels |= dict.fromkeys((pair.a, pair.b))
        item = pair.outcome
        if isinstance(item, NotCompared):
            self.not_compared.append(pair)
            return
        chance_of_one = float(item.chance[-1, -1]) / item.k_used
        self._kept.append(
            _Kept(
                pair.a,
                pair.b,
                item.name,
                item.other,
                item.role,
                item.layer,
                item.side,
                np.diag(item.grid).copy(),
                chance_of_one,
                item.note,
            )
        )

    def rows(self) -> list[Row]:
        """One row per pair, matrix and side, pairs in the updates' order."""
        return [
            {
                "a": kept.a,
                "b": kept.b,
                "name": kept.name,
                "side": kept.side,
                "k_used": len(kept.diagonal),
                "phi": float(kept.diagonal[-1]),
                "chance": len(kept.diagonal) * kept.chance_of_one,
                "other": kept.other,
                "note": kept.note,
            }
            for kept in self._in_order()
        ]

    def pooled(self, by: Pooling = "role") -> list[Row]:
        """The mean φ(k, k) over the matrices of each pair and side, k as far as all of them reach.

        Args:
            by: "role", "layer" or "matrix" for a row each; "all" for one over everything.

        Raises:
            SelectionError: `by` is none of these.
        """
        if by not in get_args(Pooling):
            raise SelectionError(f"by={by!r} is not one of {', '.join(get_args(Pooling))}")
        groups: dict[tuple[Any, ...], list[_Kept]] = {}
        for kept in self._in_order():
            groups.setdefault((kept.a, kept.b, *_GROUPS[by](kept), kept.side), []).append(kept)
        rows = [
            {"a": a, "b": b, word: value, "side": side, "matrices": len(members), **_mean(members)}
            for (a, b, word, value, side), members in groups.items()
        ]
        if by != "role":
            return rows
        first, roles = {pair: i for i, pair in enumerate(dict.fromkeys(key[:2] for key in groups))}, self.groups(by)
        return sorted(rows, key=lambda row: (first[row["a"], row["b"]], roles.index(row["role"])))

    def groups(self, by: Pooling = "role") -> list[str | int | None]:
        """The roles, layers or matrices that there are: roles in the model's order, layers ascending."""
        present = list(dict.fromkeys(_GROUPS[by](kept)[1] for kept in self._kept))
        if by == "role":
            return list(naming.in_model_order(kept.role for kept in self._kept))
        return sorted(present, key=lambda layer: (layer is None, layer)) if by == "layer" else present

    def square(
        self, side: Side = "left", by: Pooling = "all", group: str | int | None = "all", *, value: str = "phi"
    ) -> np.ndarray:
        """N×N, symmetric: φ(k, k) of every two updates over one group of matrices; NaN where they share none.

        Args:
            side: "left" or "right".
            by: what the groups are, as for `pooled`.
            group: which one, as `groups(by)` has them.
            value: another column of `pooled`: "chance", "k_used".
        """
        place = {label: i for i, label in enumerate(self.labels)}
        grid = np.full((len(place), len(place)), np.nan)
        if value == "phi":
            np.fill_diagonal(grid, 1.0)
        members: dict[tuple[str, str], list[_Kept]] = {}
        for kept in self._kept:
            if kept.side == side and _GROUPS[by](kept)[1] == group:
                members.setdefault((kept.a, kept.b), []).append(kept)
        for (a, b), some in members.items():
            grid[place[a], place[b]] = grid[place[b], place[a]] = _mean(some)[value]
        return grid

    def order(self, side: Side | None = None) -> list[int]:
        """The updates' places in clustered order: those that share directions stand together.

        Average linkage on 1 − φ over everything; of the orders that fit the tree, the one whose neighbours are nearest.
        Pairs that share no matrix count as φ = 0.

        Reference: Bar-Joseph et al. 2001 (optimal leaf ordering), as in scipy.cluster.hierarchy.
        """
        squares = [self.square(one) for one in ([side] if side else self.sides)]
        return clustered(np.mean([np.nan_to_num(square) for square in squares], axis=0)) if squares else []

    def to_frame(self, by: Literal["pair"] | Pooling = "pair") -> pd.DataFrame:
        """`rows` or `pooled` as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows() if by == "pair" else self.pooled(by))

    def _in_order(self) -> Iterator[_Kept]:
        place = {label: i for i, label in enumerate(self.labels)}
        names = {name: i for i, name in enumerate(dict.fromkeys(kept.name for kept in self._kept))}
        return iter(
            sorted(
                self._kept, key=lambda kept: (place[kept.a], place[kept.b], _depth(kept), names[kept.name], kept.side)
            )
        )


def clustered(similarity: np.ndarray) -> list[int]:
    """Places in clustered order, by average linkage on 1 − similarity (N×N, symmetric).

    Example:
        >>> clustered(np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]))
        [0, 2, 1]
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(similarity) < 3:
        return list(range(len(similarity)))
    distance = 1.0 - similarity
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(np.clip(distance, 0.0, None), checks=False), "average", optimal_ordering=True)
    order = [int(place) for place in leaves_list(tree)]
    return order if order[0] <= order[-1] else order[::-1]  # the two directions of a tree are one order


def _mean(members: Sequence[_Kept]) -> Row:
    k = min(len(kept.diagonal) for kept in members)
    return {
        "k_used": k,
        "phi": float(np.mean([kept.diagonal[k - 1] for kept in members])),
        "chance": float(np.mean([k * kept.chance_of_one for kept in members])),
    }


def _depth(kept: _Kept) -> int:
    return -1 if kept.layer is None else kept.layer
