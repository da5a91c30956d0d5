"""A verified merge in a picture: what each matrix of the merged model is, layer by layer and role by role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import SelectionError
from spectra.merges.report import AS_IT_SHOULD_BE, VERDICTS
from spectra.plots.panels import ems_of_legend, ems_of_title, panelled, put_legend
from spectra.plots.places import ordered_places, ordered_rows, place_of, row_of
from spectra.plots.sizes import DEFAULT, arranged, size_of
from spectra.printing import in_figure, shortened
from spectra.text import matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Verdict → its colour, and the sign by which it is known without colour.
_SHOWN = {
    "exact": ("#009E73", "="),
    "rounded": ("#56B4E9", "≈"),
    "too small to tell": ("#CCCCCC", "?"),
    "scaled": ("#E69F00", "s"),
    "not applied": ("#000000", "0"),
    "damaged": ("#D55E00", "×"),
    "different": ("#CC79A7", "≠"),
    "untouched but changed": ("#F0E442", "!"),
}
_OTHER = ("#777777", "–")
_LABELS = 24  # numbers under the columns
_OF_LEGEND = 0.65  # ems of a letter of the legend, with its part of the patch before it
_LONGEST = 40  # characters of a role


def verdicts_figure(rows: Iterable[Mapping[str, Any]], *, title: str = "", size: str = DEFAULT) -> Figure:
    """The verdict of every matrix over layer × role; where several share a cell, the worst of them.

    Args:
        rows: `verify_merge(…).matrices`, or the rows of verify.csv.
        title: above how many matrices are as they should be.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: there is no matrix.
    """
    verdicts = {str(row["name"]): str(row["verdict"]) for row in rows}
    if not verdicts:
        raise SelectionError("no matrix was verified: there is no verdict to draw")
    roles, places = ordered_rows(verdicts), ordered_places(verdicts)
    names = 0.5 * min(max(map(len, roles)), _LONGEST)
    width = min(max(1.3 * len(places), 14.0), size_of(size).widest - names - 2.0)
    counts = {verdict: list(verdicts.values()).count(verdict) for verdict in _by_weight(verdicts.values())}
    legend = {verdict: _told(verdict, count) for verdict, count in counts.items()}
    widest = _OF_LEGEND * max(map(len, legend.values()))
    width = max(width, min(widest, size_of(size).widest) - names)
    whole = names + width + 2.0
    around = 3.0 + ems_of_legend(legend.values(), whole) + ems_of_title(title, whole)
    layout = arranged(size, 1, (whole, 6.0 + 1.5 * len(roles)), above=around)
    good = sum(count for verdict, count in counts.items() if verdict in AS_IT_SHOULD_BE)
    with panelled(layout, title=title) as (figure, [ax]):
        _draw(ax, verdicts, roles, places, signs=width / len(places) >= 1.0)
        for verdict, words in legend.items():
            ax.fill_between([], [], color=_SHOWN.get(verdict, _OTHER)[0], linewidth=0, label=words)
        put_legend(figure, ax, layout)
        ax.set_title(f"{good:,} of {matrices(len(verdicts))} as merged")
    return figure


def _by_weight(verdicts: Iterable[str]) -> list[str]:
    """Each verdict once, the best first."""
    weight = {verdict: place for place, verdict in enumerate(VERDICTS)}
    return sorted(dict.fromkeys(verdicts), key=lambda verdict: -weight.get(verdict, 0))


def _draw(ax: Axes, verdicts: Mapping[str, str], roles: list[str], places: list[Any], signs: bool) -> None:
    from matplotlib.colors import to_rgb

    cells: dict[tuple[int, int], list[str]] = {}
    for name, verdict in verdicts.items():
        cells.setdefault((roles.index(row_of(name)), places.index(place_of(name))), []).append(verdict)
    colours = np.ones((len(roles), len(places), 3))
    for (i, j), members in cells.items():
        colour, sign = _SHOWN.get(_by_weight(members)[-1], _OTHER)
        colours[i, j] = to_rgb(colour)
        if signs:
            dark = colours[i, j] @ (0.299, 0.587, 0.114) < 0.5
            ax.text(j, i, sign, ha="center", va="center", fontsize="small", color="white" if dark else "black")
    ax.imshow(colours, aspect="auto", interpolation="nearest")
    ax.grid(visible=False)
    step = math.ceil(len(places) / _LABELS)
    ax.set_xticks(range(0, len(places), step), [in_figure(place.label or "–") for place in places[::step]])
    ax.set_yticks(range(len(roles)), [in_figure(shortened(role, _LONGEST)) for role in roles])
    ax.set_xlabel("layer")


def _told(verdict: str, count: int) -> str:
    """A verdict's words in the legend."""
    return in_figure(f"{_SHOWN.get(verdict, _OTHER)[1]}  {verdict}: {matrices(count)}")
