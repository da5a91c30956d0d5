"""One side of several updates of one weight: their singular vectors, in as few numbers as their inner products need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

_ROWS = 512  # of all vectors that are decomposed at once, at least


@dataclass(frozen=True, eq=False)
class Side:
    """The left or the right singular vectors of several updates, in an orthonormal basis of what all of them span.

    No metric between updates depends on the basis. With R vectors of d entries in it, R < d, they are R×R numbers.

    Attributes:
        size: d, the entries of a vector: rows of the weight on the left, columns on the right.
        vectors: of each update its vectors as columns, in the common basis.
        overlap: the inner products of all vectors, side by side in the updates' order.

    Example:
        >>> eye = torch.eye(5, dtype=torch.float64)
        >>> side = Side.of([eye[:, :2], -eye[:, 1:2]])
        >>> side.size, [tuple(own.shape) for own in side.vectors], side.overlap.tolist()[1]
        (5, [(3, 2), (3, 1)], [0.0, 1.0, -1.0])
    """

    size: int
    vectors: tuple[Float64[Tensor, "d _"], ...]
    overlap: Float64[Tensor, "R R"]

    @classmethod
    def of(cls, updates: Sequence[Float64[Tensor, "d _"]]) -> Side:
        """From each update's vectors."""
        beside = Beside(sum(own.shape[1] for own in updates))
        for own in updates:
            beside.add(own)
        return beside.side()

    @property
    def together(self) -> Float64[Tensor, "d R"]:
        """All vectors side by side."""
        return torch.cat(self.vectors, 1)


class Beside:
    """The vectors of updates as they come, in one matrix: pieces would be held beside it, and by malloc after that.

    Args:
        most: how many vectors will come at most. What is not filled of a matrix in main memory is never there.

    Example:
        >>> beside = Beside(3)
        >>> beside.add(torch.eye(5, dtype=torch.float64)[:, :2])
        >>> beside.side().overlap.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: list[int] = []
        self._rows: Float64[Tensor, "most d"] | None = None

    def add(self, vectors: Float64[Tensor, "d _"]) -> None:
        """The next update's, as columns."""
        if self._rows is None:
            self._rows = vectors.new_empty(self._most, vectors.shape[0])
        start = sum(self._counts)
        self._counts.append(vectors.shape[1])
        self._rows[start : start + vectors.shape[1]] = vectors.mT

    def side(self) -> Side:
        """What came, once; the matrix is let go before a basis of all takes its place."""
        if self._rows is None:
            raise ValueError("no update has been added")
        everything, self._rows = self._rows[: sum(self._counts)].mT, None
        overlap = everything.mT @ everything
        size, count = everything.shape
        found = _triangle(everything) if count < size else everything
        return Side(size, torch.split(found, self._counts, 1), overlap)


def random_side(size: int, counts: Sequence[int], seed: int, device: torch.device) -> Side:
    """Uniformly random orthonormal vectors, each update's by themselves.

    They are what QR leaves of Gaussian columns; their coordinates in all columns' own basis are drawn at once, so that
    no vector of `size` entries is there where they are fewer than that: a triangle of N(0, 1) with χ on the diagonal.

    Example:
        >>> side = random_side(6, [2], 0, torch.device("cpu"))
        >>> bool(torch.allclose(side.overlap, torch.eye(2, dtype=torch.float64)))
        True

    Reference: the Bartlett decomposition of a Wishart matrix, whose factor that triangle is.
    """
    drawn = _gaussian(size, sum(counts), np.random.default_rng(seed)).to(device)
    vectors = tuple(_orthonormal(own) for own in torch.split(drawn, list(counts), 1))
    everything = torch.cat(vectors, 1)
    return Side(size, vectors, everything.mT @ everything)


def _orthonormal(columns: Tensor) -> Tensor:
    """Q of the QR decomposition whose R has a positive diagonal: LAPACK's signs are not random."""
    Q, R = torch.linalg.qr(columns)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def _gaussian(size: int, count: int, generator: np.random.Generator) -> Tensor:
    """size × count of N(0, 1), or the triangular factor of such a matrix where that is smaller."""
    drawn = generator.standard_normal((min(size, count), count))
    if count < size:
        drawn = np.triu(drawn, 1) + np.diag(np.sqrt(generator.chisquare(size - np.arange(count))))
    return torch.from_numpy(drawn)


def _triangle(tall: Float64[Tensor, "d R"]) -> Float64[Tensor, "R R"]:
    """R of the QR decomposition, some rows after the others: LAPACK would copy all of them at once.

    Reference: Demmel et al. 2012 (TSQR, the sequential one).
    """
    count = tall.shape[1]
    height = max(_ROWS, 2 * count)
    found = tall[:0]
    for start in range(0, tall.shape[0], height):
        found = torch.linalg.qr(torch.cat([found, tall[start : start + height]]), "r").R
    return found
