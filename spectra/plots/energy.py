"""Whole figures of where an update's energy lies: over its directions, and over the parameters that hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.extraction.ranks import KeptEnergy, kept_by_budget, kept_by_uniform_rank
from spectra.plots.panels import panelled, put_legend, put_title
from spectra.plots.ranks import plot_kept_energy
from spectra.plots.scree import ENERGY, plot_scree, ranks_for, scree_curves
from spectra.plots.sizes import DEFAULT, arranged
from spectra.spectrum import Spectrum
from spectra.text import figure as number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = (34.0, 26.0)  # ems
_LINE = 1.2  # ems of a line of small text

Curves = Iterable[Spectrum] | Mapping[str, Iterable[Spectrum]]


def scree_figure(spectra: Curves, *, energy: float = ENERGY, title: str = "", size: str = DEFAULT) -> Figure:
    """`plot_scree` as a figure whose title says how many directions hold the share of the energy.

    Args:
        spectra: as for `plot_scree`.
        energy: as for `plot_scree`.
        title: above.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: as for `plot_scree`, or there is no such size.
    """
    held = _held(spectra)
    layout = arranged(size, 1, _PANEL, above=4.0 + _LINE * len(held), stretched=True)
    with panelled(layout, title=title) as (figure, [ax]):
        plot_scree(held, energy=energy, legend=False, ax=ax)
        put_title(ax, _directions(held, energy), layout)
        put_legend(figure, ax, layout)
    return figure


def kept_energy_figure(spectra: Curves, *, energy: float = ENERGY, title: str = "", size: str = DEFAULT) -> Figure:
    """`plot_kept_energy` of one update or several, whose title says how many parameters keep the share of the energy.

    Args:
        spectra: the matrices of one update, or label → those of each.
        energy: the share that the title speaks of.
        title: above.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: no matrix of an update changed, or there is no such size.
    """
    held = _held(spectra)
    layout = arranged(size, 1, _PANEL, above=4.0 + 2 * _LINE * len(held), stretched=True)
    with panelled(layout, title=title) as (figure, [ax]):
        for label, members in held.items():
            plot_kept_energy(members, label=label, legend=False, ax=ax)
        put_title(ax, _parameters(held, energy), layout)
        put_legend(figure, ax, layout)
    return figure


def scree_rows(spectra: Curves) -> list[dict[str, Any]]:
    """The numbers of `scree_figure`: curve, index, the median σ and the band's ends."""
    return [
        {"curve": label, "index": place + 1, "median": middle, "low": low, "high": high}
        for label, band in scree_curves(_held(spectra)).items()
        for place, (low, middle, high) in enumerate(band.T.tolist())
    ]


def kept_rows(spectra: Curves) -> list[dict[str, Any]]:
    """The numbers of `kept_energy_figure`: update, which ranks, parameters of all factors, kept share."""
    return [
        {"update": label, "ranks": ranks, "parameters": parameters, "kept": kept}
        for label, members in _held(spectra).items()
        for ranks, curve in (("best", kept_by_budget(members)), ("uniform", kept_by_uniform_rank(members)))
        for parameters, kept in zip(curve.parameters.tolist(), curve.kept.tolist(), strict=True)
    ]


def _held(spectra: Curves) -> dict[str, list[Spectrum]]:
    from spectra.results.collection import Spectra

    labelled = spectra if isinstance(spectra, Mapping) else {"": spectra}
    return {
        label: list(items.without_vectors() if isinstance(items, Spectra) else items)
        for label, items in labelled.items()
    }


def _directions(held: Mapping[str, list[Spectrum]], energy: float) -> str:
    """How many directions hold the share, in the median matrix of each curve."""
    found = {label: ranks for label, members in held.items() if (ranks := ranks_for(members, energy))}
    medians = {label: float(np.median(ranks)) for label, ranks in found.items()}
    return _said(f"{100 * energy:g} % of a matrix's energy in", {k: number(v) for k, v in medians.items()}, medians,
                 "directions", "only the top of the spectra is known")  # fmt: skip


def _parameters(held: Mapping[str, list[Spectrum]], energy: float) -> str:
    """How many parameters keep the share, spent where they lose least."""
    curves = {label: kept_by_budget(members) for label, members in held.items()}
    enough = {label: _enough(curve, energy) for label, curve in curves.items()}
    known = {label: float(count) for label, count in enough.items() if count is not None}
    return _said(f"{100 * energy:g} % of the energy in", {k: f"{v:,.0f}" for k, v in known.items()}, known,
                 "parameters", f"the known values hold less than {100 * energy:g} % of the energy")  # fmt: skip


def _enough(curve: KeptEnergy, energy: float) -> int | None:
    reached = np.flatnonzero(curve.kept >= energy - 1e-12)  # the sum of all squares is rounded
    return int(curve.parameters[reached[0]]) if len(reached) else None


def _said(before: str, words: Mapping[str, str], sizes: Mapping[str, float], what: str, otherwise: str) -> str:
    """One number, or the least and the most with their labels."""
    if not words:
        return otherwise
    least, most = min(sizes, key=lambda label: sizes[label]), max(sizes, key=lambda label: sizes[label])
    if len(words) == 1:
        return f"{before} {words[least]} {what}" + (f" ({least})" if least else "")
    return f"{before} {words[least]} ({least}) to {words[most]} {what} ({most})"
