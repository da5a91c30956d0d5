r"""Block Lanczos: an orthonormal basis of the block Krylov space of a symmetric operator, and the operator on it.

Every new block is orthogonalised against the whole basis, twice, so that no value shows up as a false copy of
another and a block that has run out (a matrix of low rank) goes on with directions that are still unused.

Reference: Golub & Underwood 1977, "The block Lanczos method for computing eigenvalues"; Parlett 1998, ch. 13.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from spectra.deltas.thin import times

_HALF = 0.5  # a column that loses more of its length to the basis a second time was rounding error
_PASSES = 6

Operator = Callable[[Tensor], Tensor]  # block (s, b) ↦ the symmetric matrix times the block


class Krylov:
    """The space that a block and its images span, grown by one block at a time.

    Args:
        operator: the symmetric operator.
        start: orthonormal columns to start from.
        capacity: the largest dimension.

    Example:
        >>> diagonal = torch.tensor([3.0, 2.0, 1.0]).double()
        >>> space = Krylov(lambda block: diagonal[:, None] * block, torch.ones(3, 1).double() / 3**0.5, 3)
        >>> for _ in range(3):
        ...     space.grow()
        >>> space.ritz(3)[0].round(decimals=9).tolist()
        [3.0, 2.0, 1.0]
    """

    def __init__(self, operator: Operator, start: Float64[Tensor, "s b"], capacity: int) -> None:
        self.operator = operator
        self.width = start.shape[1]
        self.dimension = 0
        room = capacity + self.width  # one block more than is in use: what the next product starts from
        self._basis = start.new_empty((room, start.shape[0])).T  # column by column
        self._projected = start.new_zeros((room, room))
        self._basis[:, : self.width] = start

    @property
    def full(self) -> bool:
        """Whether no further block fits."""
        return self.dimension + 2 * self.width > self._basis.shape[1]

    def grow(self) -> None:
        """Multiply the last block, and take what is new in the product as the next one."""
        old, new = slice(0, self.dimension + self.width), slice(self.dimension, self.dimension + self.width)
        basis = self._basis[:, old]
        image = self.operator(basis[:, new])
        along = times(basis.T, image)
        rest = image - times(basis, along)
        block = _directions(rest, basis)
        self.dimension += self.width
        following = slice(self.dimension, self.dimension + self.width)
        self._projected[old, new] = along + times(basis.T, rest)
        self._projected[following, new] = block.T @ rest
        self._basis[:, following] = block

    def ritz(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The largest Ritz values descending, their vectors' coefficients (dimension, count), and their residuals."""
        inside = slice(0, self.dimension)
        upper = self._projected[inside, inside].triu()
        values, coefficients = torch.linalg.eigh(upper + upper.triu(1).T)
        values, coefficients = values.flip(0)[:count], coefficients.flip(1)[:, :count]
        beyond = self._projected[
            self.dimension : self.dimension + self.width, self.dimension - self.width : self.dimension
        ]
        return values, coefficients, (beyond @ coefficients[-self.width :]).norm(dim=0)

    def vectors(self, coefficients: Float64[Tensor, "d k"]) -> Float64[Tensor, "s k"]:
        """Combinations of the basis."""
        return times(self._basis[:, : self.dimension], coefficients)


def random_block(taken: Float64[Tensor, "s d"], width: int) -> Float64[Tensor, "s b"]:
    """Orthonormal columns, orthogonal to those that are taken; the same ones every time."""
    generator = torch.Generator().manual_seed(taken.shape[1])
    block = torch.randn((len(taken), width), dtype=taken.dtype, generator=generator).to(taken.device)
    for _ in range(2):
        block = torch.linalg.qr(block - times(taken, times(taken.T, block))).Q
    return block


def _directions(rest: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns for what is left of a block's image; new directions where nothing but rounding is left."""
    block = torch.linalg.qr(rest).Q
    for _ in range(_PASSES):
        block, kept = torch.linalg.qr(block - times(basis, times(basis.T, block)))
        lost = kept.diagonal().abs() < _HALF
        if not bool(lost.any()):
            break
        block[:, lost] = random_block(basis, int(lost.sum()))
    return block
