"""The page's pictures in numbers: where bars, cells and marks stand. The template draws them as plain SVG and tables.

No charting library is embedded. Minified, plotly 7.1 takes 4.8 MB, bokeh 3.9 1.3 MB, echarts 6.1 1.1 MB, vega with
vega-lite and vega-embed .83 MB; chart.js (.21 MB) and uPlot (.05 MB) draw on a canvas, which a screen reader does not
read and a printer sees as dots. The page's own style and script are 25 kB together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from spectra import naming, text
from spectra.errors import SelectionError
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots.depth import value_range
from spectra.plots.figures import depth_grids
from spectra.plots.grouping import MOST_CURVES, curves_by_role
from spectra.plots.histogram import bin_pooled, pool_curves
from spectra.plots.places import ordered_rows, row_of
from spectra.report.cells import ends, level, panel
from spectra.report.runs import Run
from spectra.results.similarities import pool_by_role
from spectra.spectrum import Spectrum

_Named = TypeVar("_Named", Spectrum, SubspaceSimilarity)
BINS = 60
HEIGHT = 44  # of a curve, in pixels
DEPTH_METRICS = {
    "relative_norm": "‖ΔW‖_F / ‖W₀‖_F: how large the update is beside the weight",
    "norm": "‖ΔW‖_F: how large the update is",
    "stable_rank": "Σσ²/σ₁²: 1 where one direction holds all of the energy",
    "effective_rank": "exp of the entropy of σ/Σσ: over how many directions the update spreads",
    "rank_90": "how many directions hold 90 % of the energy Σσ²",
    "top_8_share": "the share of the energy Σσ² in the top 8 directions",
    "signal_rank": "how many singular values are above the storage-rounding edge",
}
_MOST_TICKS = 7
_MOST_PANELS = 24
_MOST_BARS = 12  # rows of bars, which need no colours of their own


def histogram(runs: Sequence[Run]) -> dict[str, Any] | None:
    """A row of bars per role of one run, or per run of several, on shared bins; None if no value is there to draw."""
    filled = [run for run in runs if run.spectra]
    left_out: list[str] = []
    if len(filled) == 1:
        curves, left_out = _by_role(filled[0].spectra)
    else:
        curves = {run.label: list(run.spectra) for run in filled}
    try:
        panel = bin_pooled(pool_curves(curves), bins=BINS)
    except SelectionError:
        return None
    low, high = float(panel.edges[0]), float(panel.edges[-1])
    tallest = max(float(curve.heights.max()) for curve in panel.curves) or 1.0

    def at(x: float) -> float:
        return round(100 * (x - low) / (high - low), 3)

    rows = []
    for curve in panel.curves:
        pairs = list(zip(panel.edges[:-1].tolist(), panel.edges[1:].tolist(), strict=True))
        total = text.figure(len(curve.values.x))
        bars = [
            {
                "x": at(left), "width": round(100 / BINS, 3), "height": round(HEIGHT * height / tallest, 2),
                "tip": f"σ from {text.figure(math.exp(-right))} to {text.figure(math.exp(-left))}: "
                       f"{text.figure(int(count))} of {total} values, {text.figure(height)} %",
            }
            for (left, right), height, count in zip(pairs, curve.heights.tolist(), curve.counts.tolist(), strict=True)
            if count
        ]  # fmt: skip
        edge = float(np.median(curve.values.edges)) if len(curve.values.edges) else math.nan
        rows.append(
            {
                "label": curve.values.label,
                "said": curve.values.legend.removeprefix(f"{curve.values.label}: "),
                "bars": bars,
                "median": text.figure(float(np.exp(-np.median(curve.values.x)))),
                "edge": at(edge) if low < edge < high else None,
                "edge_value": text.figure(math.exp(-edge)) if not math.isnan(edge) else "",
            }
        )
    return {"rows": rows, "ticks": [{"x": at(x), "label": label} for x, label in _ticks(low, high)],
            "height": HEIGHT, "shaded": any(row["edge"] is not None for row in rows),
            "left_out": left_out, "by_run": len(filled) > 1}  # fmt: skip


def _by_role(spectra: Sequence[Spectrum]) -> tuple[dict[str, list[Spectrum]], list[str]]:
    """Roles and what is left out: those of single matrices, if others are enough for a picture of their own.

    A single matrix of few values has taller bars than all others, which flattens these.
    """
    counts = Counter(spectrum.role for spectrum in spectra)
    single = [role for role in counts if counts[role] == 1]
    if len(counts) - len(single) < MOST_CURVES:
        return curves_by_role(_in_order(spectra))
    repeated = [spectrum for spectrum in spectra if counts[spectrum.role] > 1]
    curves, left_out = curves_by_role(_in_order(repeated), most=_MOST_BARS)
    return curves, left_out + single


def _in_order(items: Sequence[_Named]) -> list[_Named]:
    """Role by role, as they stand in the pictures over depth."""
    rows = {row: place for place, row in enumerate(ordered_rows(item.name for item in items))}
    return sorted(items, key=lambda item: rows[row_of(item.name)])


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round values of σ between two values of −ln σ."""
    exponents = range(math.floor(-high / math.log(10)), math.ceil(-low / math.log(10)) + 1)
    digits = (1, 2, 5) if (high - low) < 1.5 * math.log(10) else (1, 3) if len(exponents) <= 4 else (1,)
    places = [(-math.log(d) - e * math.log(10), f"{d * 10.0**e:.0e}") for e in exponents for d in digits]
    inside = sorted((x, label) for x, label in places if low <= x <= high)
    step = math.ceil(len(inside) / _MOST_TICKS) or 1
    return [(x, text.figure(float(label))) for x, label in inside[::step]]


def depth(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A block per metric: a table of coloured cells per run, all with the same rows, columns and colours."""
    rows = {run.label: run.rows for run in runs if run.rows}
    if not rows:
        return []
    blocks = []
    for metric, words in DEPTH_METRICS.items():
        grids = {label: grid for (label, _), grid in depth_grids(rows, [metric]).items()}
        if not any(grid.numbers.any() for grid in grids.values()):
            continue
        limits = value_range(grids.values())
        blocks.append(
            {
                "metric": metric,
                "words": words,
                "panels": [panel(label, grid, limits) for label, grid in grids.items()],
                **ends(limits),
            }
        )
    return blocks


def similarity(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], int]:
    """A panel per run, role and side, φ averaged over the matrices; and how many panels were left out."""
    several = len([run for run in runs if run.similarities]) > 1
    panels = [
        _similar(item, f"{run.label}: {item.name}" if several else item.name) | _updates(run)
        for run in runs
        for item in pool_by_role(_in_order(run.similarities))
    ]
    return panels[:_MOST_PANELS], max(len(panels) - _MOST_PANELS, 0)


def _updates(run: Run) -> dict[str, str]:
    """What the two updates are called, by the last part of their paths."""
    facts = run.facts
    return {key: facts.get(f"{key} update", "").rstrip("/").rpartition("/")[2] or f"the {key} update"
            for key in ("first", "second")}  # fmt: skip


def _similar(item: SubspaceSimilarity, title: str) -> dict[str, Any]:
    k = item.k_used
    cells: dict[int, list[str]] = {}
    for i, line in enumerate(item.grid.tolist()):
        for j, phi in enumerate(line):
            # A little over the next ones, for else a printed square shows seams.
            cells.setdefault(level(phi, (0.0, 1.0)), []).append(f"M{j} {i}h1.03v1.03h-1.03z")
    shown = sorted({place for place in (1, 2, 5, 10, 20, 50, 100) if place < k} | {k})
    ends = {place: [text.figure(float(of[place - 1, place - 1])) for of in (item.grid, item.chance)] for place in shown}
    return {
        "title": title, "side": item.side, "k": k, "note": item.note,
        "paths": [(step, "".join(places)) for step, places in sorted(cells.items())],
        "grid": [[round(phi, 3) for phi in line] for line in item.grid.tolist()],
        "diagonal": [(place, phi, chance) for place, (phi, chance) in ends.items()],
    }  # fmt: skip


def curve(values: np.ndarray, norm: float | None, most: int) -> list[list[float]]:
    """A spectrum as points [index, σ, share of the energy up to it], few enough to embed, first and last among them."""
    if not len(values) or not values[0] > 0:
        return []
    places = np.unique(np.geomspace(1, len(values), most).round().astype(int)) - 1
    energy = np.cumsum(np.square(values / values[0]))
    total = max(((norm or 0.0) / values[0]) ** 2, energy[-1])
    return [[int(i) + 1, _short(values[i]), _short(energy[i] / total)] for i in places]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def roles(runs: Sequence[Run], medians: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the table by role: run's label and its medians, runs of one role together."""
    names = [spectrum.name for run in runs for spectrum in run.spectra]
    first = {naming.role_of(name): name for name in reversed(names)}
    rows = {row: place for place, row in enumerate(ordered_rows(names))}
    order = sorted(first, key=lambda role: rows[row_of(first[role])])
    lines = {(run.label, line["role"]): line for run in runs for line in medians[run.label]}
    return [
        {"run": run.label, **lines[run.label, role]} for role in order for run in runs if (run.label, role) in lines
    ]
