"""Eigenvalues of a Gram matrix, by torch's LAPACK or by numpy's: two builds of the same algorithm, of unequal speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64
from threadpoolctl import threadpool_limits
from torch import Tensor

Library = Literal["torch", "numpy"]

_limited: list[None] = []  # one per `numpy_on_one_core` that is open


def by_torch(gram: Float64[Tensor, "*batch s s"]) -> Float64[Tensor, "*batch s"]:
    """Ascending, of one matrix or a batch, on its device; only the upper triangle is read.

    The transpose is already in LAPACK's order, which saves a strided copy.

    Example:
        >>> by_torch(torch.tensor([[1.0, 2.0], [-9.0, 1.0]]).double()).tolist()
        [-1.0, 3.0]
    """
    return torch.linalg.eigvalsh(gram.mT, UPLO="L")


def by_numpy(gram: Float64[Tensor, "s s"]) -> Float64[Tensor, " s"]:
    """The same of one matrix on the CPU; other threads of this process go on meanwhile.

    Raises:
        RuntimeError: the iteration did not converge, which torch tells by the same class.

    Example:
        >>> by_numpy(torch.tensor([[1.0, 2.0], [-9.0, 1.0]]).double()).tolist()
        [-1.0, 3.0]
    """
    try:
        return torch.from_numpy(np.linalg.eigvalsh(gram.numpy().T, UPLO="L"))
    except np.linalg.LinAlgError as problem:
        raise RuntimeError(f"numpy's eigvalsh: {problem}") from None


BY: Mapping[Library, Callable[[Tensor], Tensor]] = {"torch": by_torch, "numpy": by_numpy}


@contextmanager
def numpy_on_one_core() -> Iterator[None]:
    """Numpy's LAPACK takes one core inside, for each of the threads that use it at once; as it was afterwards.

    The limit is the process's, and only the thread that sets it can put it back: enter from the one that waits for the
    others. Torch's threads are not touched, its libraries being linked into it.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        _limited.append(None)
        try:
            yield
        finally:
            _limited.pop()


def is_numpy_limited() -> bool:
    """Whether numpy is on one core in this process now."""
    return bool(_limited)
