"""Singular values over their index: how fast an update's directions lose their weight, and where its energy ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from spectra.errors import SelectionError, TruncatedSpectrumError, refuse_path_for_spectra
from spectra.metrics.rank import rank_at
from spectra.plots.style import curves, legend_below, marked, new_axes, stroke
from spectra.printing import in_figure
from spectra.results.collection import Spectra
from spectra.spectrum import Spectrum
from spectra.text import figure, matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENERGY = 0.9
_BAND = (10, 90)  # percent of the matrices, between which the band lies


def plot_scree(
    spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]],
    *,
    energy: float = ENERGY,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """σ_i over i, both logarithmic: of several matrices the median, and a band that holds the middle 80 % of them.

    A mark on the curve, and the dotted line through it, tell how many directions hold this share of the energy Σσ² (the
    median of `rank_at`), and the legend says the number; where only the top of the spectra is known, the mark is at its
    end. At an index that only some matrices reach, the median is over these.

    Args:
        spectra: updates that make one curve, or label → updates for one curve each.
        energy: the share that is marked, above 0 and at most 1.
        legend: whether to say below the axes which curve is which.
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: there is no nonzero value to draw, or energy is no share.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_scree([Spectrum("a.weight", (2, 2), S=[3.0, 1.0])], ax=Figure().subplots())
        >>> ax.get_lines()[0].get_ydata().tolist()
        [3.0, 1.0]
    """
    if not 0 < energy <= 1:
        raise SelectionError(f"energy={energy} is not a share of Σσ² above 0 and at most 1, such as 0.9")
    groups = {label: _changed(items) for label, items in _labelled(spectra).items()}
    bands = scree_curves(groups)
    ax = new_axes(ax)
    for (label, members), (colour, mark) in zip(groups.items(), curves(), strict=False):
        if not members:
            continue
        low, middle, high = bands[label]
        index = np.arange(1, len(middle) + 1)
        ranks = ranks_for(members, energy)
        said = (
            f"{100 * energy:g} % of the energy in {figure(float(np.median(ranks)))}"
            if ranks
            else "top of the spectra only"
        )
        name = f"{label}: {matrices(len(members))}, {said}" if label else f"{matrices(len(members))}, {said}"
        place = min(max(round(float(np.median(ranks))), 1), len(middle)) if ranks else len(middle)
        ax.plot(index, middle, color=colour, label=in_figure(name), **marked(mark) | {"markevery": [place - 1]})
        if len(members) > 1:
            ax.fill_between(index, low, high, color=colour, alpha=0.15, linewidth=0)
        if ranks:
            ax.axvline(place, color=colour, linestyle=":", linewidth=stroke(0.6))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("index i of the direction, the strongest first")
    ax.set_ylabel("σ_i of ΔW")
    if legend:
        legend_below(ax)
    return ax


def scree_curves(
    spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]],
) -> dict[str, np.ndarray]:
    """Label → the lower end of its band, the median and the upper end, index by index; those with a value to draw.

    Raises:
        SelectionError: there is none.
    """
    groups = {label: _changed(items) for label, items in _labelled(spectra).items()}
    if not any(groups.values()):
        raise SelectionError("there is no nonzero singular value to draw: are all updates unchanged?")
    return {label: _percentiles([item.resolved for item in members]) for label, members in groups.items() if members}


def ranks_for(spectra: Iterable[Spectrum], energy: float) -> list[float]:
    """How many directions hold the share, of every matrix that changed; [] if one is not known far enough."""
    try:
        return [rank_at(spectrum, energy) for spectrum in spectra if spectrum.rank]
    except TruncatedSpectrumError:
        return []


def _labelled(spectra: Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]]) -> Mapping[str, Iterable[Spectrum]]:
    return spectra if isinstance(spectra, Mapping) else {"": spectra}


def _changed(spectra: Iterable[Spectrum]) -> list[Spectrum]:
    refuse_path_for_spectra(spectra, "a plot")
    held = spectra.without_vectors() if isinstance(spectra, Spectra) else spectra
    return [spectrum for spectrum in held if spectrum.rank]


def _percentiles(values: list[np.ndarray]) -> np.ndarray:
    """The lower end of the band, the median and the upper end, index by index."""
    longest = max(map(len, values))
    padded = np.full((len(values), longest), np.nan)
    for line, S in zip(padded, values, strict=True):
        line[: len(S)] = S
    return np.nanpercentile(padded, (_BAND[0], 50, _BAND[1]), axis=0)
