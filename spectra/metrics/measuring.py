"""Spectra → the values of metrics: one by one, or many of one shape as a stack."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from spectra.errors import TruncatedSpectrumError
from spectra.metrics import METRICS
from spectra.metrics.signal import OfSignal, is_all_signal
from spectra.metrics.stacked import OF_SIGNAL, STACKED, Stack, signals
from spectra.spectrum import DONE, Spectrum, times_power

Metric = Callable[[Spectrum], float]
Metrics = Mapping[str, Metric]
_SIZES = ("norm", "sigma_1", "relative_norm", "signal_norm")  # what grows with ΔW; the other metrics are ratios
_SIGNAL = "signal_"


def measured(spectrum: Spectrum, metrics: Metrics = METRICS) -> dict[str, float]:
    """Each metric's value, by its definition; NaN where it has none, or would need values that are not there."""
    usual, exponent = _of_usual_size(spectrum)
    columns = _values(metrics, usual)
    if exponent:
        columns |= {name: times_power(columns[name], exponent) for name in _SIZES if name in columns}
    return columns


def measured_together(spectra: Sequence[Spectrum], metrics: Metrics = METRICS) -> list[dict[str, float]]:
    """The same of several, in their order, up to rounding; what the others are has no influence on the numbers of one.

    Whole spectra of one shape are one stack, and everything else goes one by one.

    Example:
        >>> two = [Spectrum("a", (2, 2), S=[4.0, 3.0]), Spectrum("b", (2, 2), S=[2.0, 0.0])]
        >>> [found["stable_rank"] for found in measured_together(two)]
        [1.5625, 1.0]
    """
    found: dict[int, dict[str, float]] = {}
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, spectrum in enumerate(spectra):
        if _can_be_stacked(spectrum):
            kind = len(spectrum.S), spectrum.shape, spectrum.max_rank, spectrum.noise_edge is None
            alike.setdefault(kind, []).append(place)
    for places in alike.values():
        found |= zip(places, _measured_stack([spectra[place] for place in places], metrics), strict=True)
    return [found[i] if i in found else measured(spectrum, metrics) for i, spectrum in enumerate(spectra)]


def _can_be_stacked(spectrum: Spectrum) -> bool:
    """Whether every metric has a value, and no square leaves float64's range."""
    if spectrum.status != "ok" or not spectrum.complete or not len(spectrum.S) or not spectrum.norm:
        return False
    largest = float(spectrum.S[0])
    return spectrum.resolution < largest and 1e-70 < largest < 1e70


def _measured_stack(spectra: Sequence[Spectrum], metrics: Metrics) -> list[dict[str, float]]:
    """As `measured_together`, of spectra that are one stack."""
    stack = Stack.of(spectra)
    above = stack if spectra[0].noise_edge is None else _signals(stack, spectra)
    known = {name for name, metric in metrics.items() if METRICS.get(name) is metric}
    columns = {name: STACKED[name](stack).tolist() for name in known & STACKED.keys()}
    for name in known - columns.keys():
        plain = name.removeprefix(_SIGNAL)
        if plain in OF_SIGNAL and plain != name:
            with np.errstate(invalid="ignore"):  # of a row without a signal, which is measured alone
                columns[name] = OF_SIGNAL[plain](above).tolist()
    others = {name: metric for name, metric in metrics.items() if name not in columns}
    without = others | {name: metric for name, metric in metrics.items() if isinstance(metric, OfSignal)}
    found: list[dict[str, float]] = []
    for i, (spectrum, has_signal) in enumerate(zip(spectra, above.settled[:, 0] > 0, strict=True)):
        alone = _values(others if has_signal else without, spectrum)
        found.append({name: alone[name] if name in alone else columns[name][i] for name in metrics})
    return found


def _signals(stack: Stack, spectra: Sequence[Spectrum]) -> Stack:
    edges = np.array([spectrum.noise_edge for spectrum in spectra], dtype=np.float64)
    energies = np.array([spectrum.noise_energy or 0.0 for spectrum in spectra])
    return signals(stack, edges, energies, np.array([spectrum.resolution for spectrum in spectra]))


def _values(metrics: Metrics, spectrum: Spectrum) -> dict[str, float]:
    """Each metric's value; where all is signal, those of the signal are the plain ones and not measured again."""
    if not is_all_signal(spectrum):
        return {name: _value(metric, spectrum) for name, metric in metrics.items()}
    found: dict[Callable[[Spectrum], float], float] = {}
    columns: dict[str, float] = {}
    for name, metric in metrics.items():
        plain = metric.plain if isinstance(metric, OfSignal) else metric
        if plain not in found:
            found[plain] = _value(plain, spectrum)
        columns[name] = found[plain]
    return columns


def _value(metric: Callable[[Spectrum], float], spectrum: Spectrum) -> float:
    if spectrum.status not in DONE:
        return math.nan
    try:
        return metric(spectrum)
    except TruncatedSpectrumError:
        return math.nan


def _of_usual_size(spectrum: Spectrum) -> tuple[Spectrum, int]:
    """The spectrum as 2^e · another whose squares are in float64's range, and e; itself and 0 where they are already.

    >>> _of_usual_size(Spectrum("a", (1, 1), S=[2.0**600]))[1], _of_usual_size(Spectrum("a", (1, 1), S=[2.0]))[1]
    (601, 0)
    """
    largest = float(spectrum.S[0]) if len(spectrum.S) else 0.0
    if not math.isfinite(largest) or largest == 0 or 1e-70 < largest < 1e70:
        return spectrum, 0
    exponent = math.frexp(largest)[1]
    norm = None if spectrum.norm is None else times_power(spectrum.norm, -exponent)
    edge = None if spectrum.noise_edge is None else times_power(spectrum.noise_edge, -exponent)
    resolution = times_power(spectrum.resolution, -exponent)
    S = np.ldexp(spectrum.S, -exponent)
    return replace(spectrum, S=S, norm=norm, noise_edge=edge, noise_energy=None, resolution=resolution), exponent
