"""W₀'s singular vectors, computed once per base and kept where the user says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectra._version import __version__
from spectra.deltas.base import BaseWeight
from spectra.engine import check
from spectra.engine.solvers.dense import svd_top
from spectra.errors import SpectraError, StoreError
from spectra.metrics.alignment import Triplets
from spectra.results.homes import home_of
from spectra.results.shelf import Shelf

_SIDES = ("U", "S", "Vh")


@dataclass(frozen=True)
class BaseCache:
    """A directory with a file per base weight, named after what the weight was read from, with checksums.

    Attributes:
        directory: where the files are; made when the first is kept.
    """

    directory: Path

    @classmethod
    def at(cls, directory: str | Path | None) -> BaseCache | None:
        """The cache there; None for nowhere."""
        return None if directory is None else cls(home_of(directory))

    def holds(self, weight: BaseWeight) -> bool:
        """Whether something is kept of this very weight, whole or not."""
        return Shelf(self.directory).version(_name(weight)) is not None

    def get(self, weight: BaseWeight) -> Triplets | None:
        """What is kept of this very weight; None where there is nothing whole."""
        shelf, name = Shelf(self.directory), _name(weight)
        if shelf.version(name) is None:
            return None
        try:
            kept, _ = shelf.get(name)
            return Triplets(*(torch.from_numpy(kept[side]) for side in _SIDES))
        except (StoreError, KeyError):
            return None

    def put(self, weight: BaseWeight, triplets: Triplets) -> None:
        """Keep them: the file is there whole or not at all.

        Raises:
            StoreError: the directory cannot be written to.
        """
        arrays = {side: getattr(triplets, side).cpu().numpy() for side in _SIDES}
        Shelf(self.directory).put(_name(weight), arrays, {"weight": weight.name})


def _name(weight: BaseWeight) -> str:
    """Changes with the file's size and time, the tensor, how it is turned and cut, and the code's version."""
    return hashlib.sha256(f"{__version__}|{weight.ref!r}".encode()).hexdigest()[:32]


def triplets_of_base(weight: BaseWeight, matrix: Tensor, cache: BaseCache | None = None) -> Triplets:
    """All min(m, n) triplets of W₀ by a full SVD in float64, checked; from the cache if they are there.

    Args:
        weight: where W₀ is.
        matrix: W₀, as it was read.
        cache: where to look, and to keep them.

    Raises:
        SpectraError: W₀ is not finite, or the result does not pass the check.
        StoreError: the cache cannot be written to.
    """
    kept = cache.get(weight) if cache else None
    if kept is not None:
        return Triplets(*(array.to(matrix.device) for array in (kept.U, kept.S, kept.Vh)))
    if not bool(matrix.isfinite().all()):
        raise SpectraError(f"{weight.name} of the base has entries that are NaN or infinite: nothing to align with")
    S, U, Vh = svd_top(matrix, min(matrix.shape))
    fault = check.value_fault(S, float(matrix.norm()), 0.0)
    if fault:
        raise SpectraError(f"the SVD of the base's {weight.name} gave {fault}; try another device= (--device)")
    # In the order in which the cache keeps them: products of another order differ in their last bits.
    triplets = Triplets(U.contiguous(), S, Vh.contiguous())
    if cache:
        cache.put(weight, triplets)
    return triplets
