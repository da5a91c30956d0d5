"""Where training started, matrix by matrix: the directions that later checkpoints are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import LowRank
from spectra.errors import SpectraError, StoreError
from spectra.metrics.similarity import SIDES, Side
from spectra.metrics.start import span
from spectra.results.shelf import Shelf
from spectra.spectrum import Spectrum

Spans = dict[Side, np.ndarray]  # orthonormal columns; a side without directions is not there


class Start:
    """Orthonormal bases of the start's directions, in memory or in a directory.

    Of factors, the start is what they span, also where their product is still zero: a LoRA's A and the A of MultiLoRA
    are there before any training, on the right side. Of a full fine-tune, whose ΔW is zero then, it is the top
    directions of the first checkpoint that has some.

    Args:
        top: how many directions of an update that is not factored.
        directory: where to keep them; None for memory.
        of: what they are taken from, such as "step 100". Bases that the directory keeps of another step do not count.
        before_training: `of` says what was there before any step. Where a directory keeps bases of that, they count
            instead of a step's.
    """

    def __init__(self, top: int, directory: Path | None, of: str, *, before_training: bool = False) -> None:
        self.top = top
        self.of = of
        self._before = before_training
        self._shelf = Shelf(directory / "start") if directory else None
        self._held: dict[str, Spans] = {}
        self._unknown: set[str] = set()  # had directions at the start that nothing tells of any more

    def basis(self, name: str, side: Side) -> np.ndarray | None:
        """The basis of a matrix on a side; None where nothing is known."""
        return self._spans(name).get(side)

    def is_known(self, name: str) -> bool:
        """Whether both sides of a matrix are there."""
        return len(self._spans(name)) == len(SIDES)

    def see(self, spectrum: Spectrum, delta: WeightDelta | None = None) -> None:
        """Take from this checkpoint what no earlier one had.

        Args:
            spectrum: the update's spectrum with vectors.
            delta: the update, whose factors are read where nothing is known of the matrix.
        """
        if self.is_known(spectrum.name) or spectrum.name in self._unknown:
            return
        factored = (spectrum.max_rank or 0) < min(spectrum.shape, default=0)
        if delta is not None and delta.factored:
            self._add(spectrum.name, _of_factors(delta))
        elif factored and spectrum.k < spectrum.rank:
            self._unknown.add(spectrum.name)  # only the top of an adapter's directions is stored, and its span is more
        else:
            k = spectrum.rank if factored else min(self.top, spectrum.k, spectrum.signal_rank)
            self._add(spectrum.name, _of_vectors(spectrum, k), None if factored else self.top)

    def take(self, deltas: Mapping[str, WeightDelta]) -> None:
        """The spans of an adapter's factors as it was before training."""
        for name, delta in deltas.items():
            if delta.factored and not self._spans(name):
                self._add(name, _of_factors(delta))

    def put(self, name: str, left: np.ndarray, right: np.ndarray) -> None:
        """What factors (m, r) and (r, n) span that are not in a file."""
        self._add(name, _spans(left, right))

    def _spans(self, name: str) -> Spans:
        if self._shelf is None:
            return self._held.get(name, {})
        arrays, origins = self._stored(name)
        return {side: arrays[side] for side in SIDES if side in origins and self._counts(*origins[side])}

    def _counts(self, of: str, before_training: bool, top: int | None) -> bool:
        """Whether a stored basis is of this start; `top` is how many directions were taken where that was a choice."""
        return (of == self.of or (before_training and not self._before)) and top in (None, self.top)

    def _stored(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        try:
            if self._shelf is None or not self._shelf.path(name).is_file():
                return {}, {}
            arrays, origins = self._shelf.get(name)
            return (arrays, origins) if _fits(arrays, origins) else ({}, {})
        except StoreError:
            return {}, {}  # damaged: taken anew

    def _add(self, name: str, spans: Spans, top: int | None = None) -> None:
        """Keep the sides that are not known yet."""
        known = self._spans(name)
        new = {side: basis for side, basis in spans.items() if side not in known}
        if self._shelf is None:
            self._held[name] = known | new
        elif new:
            arrays, origins = self._stored(name)
            mine = {str(side): (self.of, self._before, top) for side in new}
            self._shelf.put(name, arrays | {str(side): basis for side, basis in new.items()}, origins | mine)


def _fits(arrays: Mapping[str, np.ndarray], origins: Mapping[str, Any]) -> bool:
    """Whether each side has a basis and says what it is taken from, as `put` writes them."""
    for origin in origins.values():
        if not (isinstance(origin, list) and len(origin) == 3 and isinstance(origin[0], str)):
            return False
        if not (isinstance(origin[1], bool) and (origin[2] is None or type(origin[2]) is int)):
            return False
    bases = all(array.ndim == 2 and array.dtype.kind == "f" for array in arrays.values())
    return bases and set(arrays) == set(origins)


def _of_factors(delta: WeightDelta) -> Spans:
    try:
        form = delta.read()
    except SpectraError:
        return {}  # its row has said so
    assert isinstance(form, LowRank)
    return _spans(form.left.cpu().numpy(), form.right.cpu().numpy())


def _spans(left: np.ndarray, right: np.ndarray) -> Spans:
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return {}
    both: Spans = {"left": span(left), "right": span(right.T)}
    return {side: basis for side, basis in both.items() if basis.shape[1]}


def _of_vectors(spectrum: Spectrum, k: int) -> Spans:
    if spectrum.U is None or spectrum.Vh is None or k == 0:
        return {}
    return {"left": spectrum.U[:, :k], "right": spectrum.Vh[:k].T}
