"""Tables of coloured cells in numbers: the class of each says its level on the scale, its text the value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spectra import text
from spectra.plots.depth import DepthGrid, finding, is_wide
from spectra.plots.places import stack_labels

LEVELS = 24  # of the colour scale
_FEW_COLUMNS = 12  # up to which cells show their numbers
_FLAT = 4  # characters of a column's name beyond which names of columns stand upright


def panel(label: str, grid: DepthGrid, limits: tuple[float, float]) -> dict[str, Any]:
    """One run's table of cells over layer × role."""
    labels = stack_labels(grid.places)
    stacks = [place.stack for place in grid.places]
    return {
        "label": label,
        "corner": "layer",
        **ends(limits),
        "finding": finding(grid),
        "stacks": [(labels[stack], stacks.count(stack)) for stack in dict.fromkeys(stacks)]
        if any(labels.values())
        else [],
        "columns": [place.label or "–" for place in grid.places],
        "upright": max(len(place.label) for place in grid.places) > _FLAT,
        "rows": [
            {"role": role, "cells": [_cell(grid, i, j, limits) for j in range(len(grid.places))]}
            for i, role in enumerate(grid.rows)
        ],
        "several": int(grid.matrices.max()) if grid.matrices.size else 0,
        "numbers": len(grid.places) <= _FEW_COLUMNS,
        "outside": [(role, text.figure(value)) for role, value in grid.outside.items()],
        "left_out": grid.left_out,
    }


def _cell(grid: DepthGrid, i: int, j: int, limits: tuple[float, float]) -> tuple[str, str]:
    """Class and text of a cell: empty, without a number, or a level of the scale."""
    if not grid.matrices[i, j]:
        return "none", ""
    return cell(float(grid.values[i, j]), limits)


def cell(value: float | None, limits: tuple[float, float]) -> tuple[str, str]:
    """Class and text of a cell that has a matrix: without a number, or a level of the scale."""
    if value is None or math.isnan(value):
        return "bare", "–"
    return f"h{level(value, limits)}", text.figure(value)


def plain_panel(
    metric: str, corner: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], limits: tuple[float, float]
) -> dict[str, Any]:
    """A table of cells with roles downwards and something else than layers to the right."""
    return {
        "label": "", "metric": metric, "corner": corner, "finding": metric, "stacks": [], "upright": False,
        "columns": columns,
        "rows": rows, "several": 0, "numbers": len(columns) <= _FEW_COLUMNS, "outside": [], "left_out": (),
        **ends(limits),
    }  # fmt: skip


def ends(limits: tuple[float, float]) -> dict[str, Any]:
    """What stands at the two ends of a scale."""
    return {"low": text.figure(_lowest(limits)), "high": text.figure(limits[1]), "log": is_wide(limits)}


def _lowest(limits: tuple[float, float]) -> float:
    """Where a scale begins: as the figures', see `plots.depth.scale`."""
    low, high = limits
    return low if is_wide(limits) or (high / 2 < low < high) else min(low, 0.0)


def level(value: float, limits: tuple[float, float]) -> int:
    """The step of the colour scale that a value has.

    >>> level(0.0, (0.0, 1.0)), level(0.5, (0.0, 1.0)), level(1.0, (0.0, 1.0))
    (0, 12, 23)
    """
    low, high = _lowest(limits), limits[1]
    if is_wide(limits):
        share = math.log(value / low) / math.log(high / low)
    else:
        share = (value - low) / (high - low) if high > low else 0.0
    return min(max(int(LEVELS * share), 0), LEVELS - 1)
