"""Where training started, matrix by matrix: the directions that later checkpoints are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import LowRank
from spectra.errors import SpectraError, StoreError
from spectra.metrics.similarity import SIDES, Side
from spectra.metrics.start import span
from spectra.results.store import Shelf
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
        of: what they were taken from. Bases that were kept of something else do not count.
    """

    def __init__(self, top: int, directory: Path | None, of: str) -> None:
        self.top = top
        self.of = of
        self._shelf = Shelf(directory / "start") if directory else None
        self._held: dict[str, Spans] = {}
        self._unknown: set[str] = set()  # had directions at the start that nothing tells of any more

    def basis(self, name: str, side: Side) -> np.ndarray | None:
        """The basis of a matrix on a side; None where nothing is known."""
        return self._spans(name).get(side)

    def see(self, spectrum: Spectrum, delta: WeightDelta | None = None) -> None:
        """Take from this checkpoint what no earlier one had.

        Args:
            spectrum: the update's spectrum with vectors.
            delta: the update, whose factors are read where nothing is known of the matrix.
        """
        known = self._spans(spectrum.name)
        if len(known) == len(SIDES) or spectrum.name in self._unknown:
            return
        factored = (spectrum.max_rank or 0) < min(spectrum.shape, default=0)
        if delta is not None and delta.factored:
            self._keep(spectrum.name, _of_factors(delta) | known)
        elif factored and spectrum.k < spectrum.rank:
            self._unknown.add(spectrum.name)  # only the top of an adapter's directions is stored, and its span is more
        else:
            k = spectrum.rank if factored else min(self.top, spectrum.k, spectrum.signal_rank)
            self._keep(spectrum.name, _of_vectors(spectrum, k) | known, None if factored else self.top)

    def take(self, deltas: Mapping[str, WeightDelta]) -> None:
        """The spans of an adapter's factors as it was before training."""
        for name, delta in deltas.items():
            if delta.factored and not self._spans(name):
                self._keep(name, _of_factors(delta))

    def put(self, name: str, left: np.ndarray, right: np.ndarray) -> None:
        """What factors (m, r) and (r, n) span that are not in a file."""
        self._keep(name, _spans(left, right))

    def _spans(self, name: str) -> Spans:
        if name not in self._held and self._shelf is not None and self._shelf.path(name).is_file():
            try:
                arrays, record = self._shelf.get(name)
            except StoreError:
                return {}  # damaged: taken anew
            if record["of"] == self.of and record["top"] in (None, self.top):
                return {side: arrays[side] for side in SIDES if side in arrays}
        return self._held.get(name, {})

    def _keep(self, name: str, spans: Spans, top: int | None = None) -> None:
        """Keep what there is; `top` is how many directions were taken where that was a choice."""
        if not spans:
            return
        if self._shelf is not None:
            self._shelf.put(name, {str(side): basis for side, basis in spans.items()}, {"of": self.of, "top": top})
        else:
            self._held[name] = spans


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
