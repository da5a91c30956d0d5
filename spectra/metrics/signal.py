"""The part of an update that is no storage rounding: its values above the edge, without what rounding added to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from spectra.errors import TruncatedSpectrumError
from spectra.spectrum import Spectrum

_FOUND: WeakKeyDictionary[Spectrum, Spectrum] = WeakKeyDictionary()  # a row of a table asks a dozen times


def signal(spectrum: Spectrum) -> Spectrum:
    r"""The update as it was before it was rounded, as far as its singular values tell: S alone.

    Errors of variance v per entry lift a value s of the exact update (m, n) to σ with σ² = (s² + vm)(s² + vn)/s².
    Solved for s²: (σ² − v(m + n) + √((σ² − v(m + n))² − 4v²mn))/2. Values up to `noise_edge` are left out, and
    v = noise_energy/(mn). Where no edge is known, all values are signal.

    Args:
        spectrum: all of it, or its top as far as the edge.

    Raises:
        TruncatedSpectrumError: values are missing that may be above the edge.

    Example:
        >>> stored = Spectrum("a", (2, 2), S=[5.0, 0.5], noise_edge=1.0, noise_energy=4.0)
        >>> signal(stored).S.round(4).tolist()
        [4.5616]

    Reference: Benaych-Georges & Nadakuditi 2012; Gavish & Donoho 2017, "Optimal shrinkage of singular values".
    """
    edge = spectrum.noise_edge
    if edge is None or is_all_signal(spectrum):
        return spectrum
    found = _FOUND.get(spectrum)
    if found is None:
        found = _FOUND[spectrum] = _above(edge, spectrum)
    return found


def is_all_signal(spectrum: Spectrum) -> bool:
    """Whether `signal` gives it back as it is: no edge is known, or there are no values."""
    return spectrum.noise_edge is None or not len(spectrum.S)


def _above(edge: float, spectrum: Spectrum) -> Spectrum:
    """As `signal`, where an edge is known."""
    if not spectrum.complete and float(spectrum.S[-1]) > edge:
        raise TruncatedSpectrumError(
            f"all {len(spectrum.S)} values of {spectrum.name} that are there are above the rounding edge, and more may "
            f"be; decompose without only_top"
        )
    above = np.square(spectrum.resolved[edge < spectrum.resolved])
    m, n = spectrum.shape
    variance = (spectrum.noise_energy or 0.0) / (m * n)
    rest = above - variance * (m + n)
    squares = (rest + np.sqrt(np.maximum(np.square(rest) - 4 * variance**2 * m * n, 0.0))) / 2
    S = np.sqrt(np.maximum(squares, 0.0))
    return replace(
        spectrum, S=S, U=None, Vh=None, k=0, norm=float(np.sqrt(np.square(S).sum())), max_rank=len(S), noise_edge=None
    )


@dataclass(frozen=True, eq=False)
class OfSignal:
    """A metric of the signal alone.

    Attributes:
        plain: the same of the whole update, which it equals where all is signal.
    """

    plain: Callable[[Spectrum], float]

    def __call__(self, spectrum: Spectrum) -> float:
        """The metric's value."""
        return self.plain(signal(spectrum))


def of_signal(metric: Callable[[Spectrum], float]) -> OfSignal:
    """A metric of the signal alone, from one of the whole update.

    Example:
        >>> rank = of_signal(lambda update: float(update.rank))
        >>> rank(Spectrum("a", (2, 2), S=[4.0, 0.5], noise_edge=1.0))
        1.0
    """
    return OfSignal(metric)
