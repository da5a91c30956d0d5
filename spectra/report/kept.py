"""What a directory holds besides spectra, as sections of a page: each is the table of another command."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from spectra import naming, text
from spectra.plots.depth import depth_grid, value_range
from spectra.plots.interference import mean_squares
from spectra.plots.places import ordered_rows
from spectra.plots.squares import most_alike, short_names
from spectra.report import cells
from spectra.results.documents import Document, damaged, read_document
from spectra.results.pairs import Pairs
from spectra.results.run_file import is_coverage
from spectra.results.series_table import TABLE as SERIES
from spectra.results.series_table import by_role
from spectra.results.tables import Row


@dataclass(frozen=True, eq=False)
class Section:
    """A table of another command, as a page shows it.

    Attributes:
        kind: which command.
        label: what the run is called.
        title: a question that it answers.
        words: how its numbers are to be read.
        findings: what they say, in sentences.
        rows: what the table lists; columns that hold lists are left out.
        shown: the columns that are seen first.
        squares: every two of several updates as a cell.
        panels: coloured cells, roles downwards.
        record: how it was made, as `run.json` would say it.
        table: the file with all numbers.
    """

    kind: str
    label: str
    title: str
    words: str
    findings: Sequence[str]
    rows: Sequence[Row]
    shown: Sequence[str]
    table: str
    squares: Sequence[Mapping[str, Any]] = ()
    panels: Sequence[Mapping[str, Any]] = ()
    record: Mapping[str, Any] = field(default_factory=dict)


def kept_sections(directory: str | Path, label: str, layers: str | Sequence[str] = ()) -> list[Section]:
    """The sections of a directory; [] where it holds none of these tables.

    Raises:
        StoreError: a table is damaged.
    """
    found = []
    for name, make in _SECTIONS.items():
        path = Path(directory, name)
        if path.is_file():
            document = read_document(path)
            rows = _chosen(document["matrices"], layers)
            try:
                found += [make(document, rows, label)] if rows else []
            except (KeyError, TypeError, ValueError, AttributeError) as problem:
                raise damaged(path, f"it lacks {problem}" if isinstance(problem, KeyError) else problem) from None
    return found


def _chosen(rows: Sequence[Row], layers: str | Sequence[str]) -> list[Row]:
    names = [str(row["name"]) for row in rows if row.get("name")]
    if not layers:
        return [row for row in rows if row.get("name")]
    chosen = set(naming.select(layers, dict.fromkeys(names)))
    return [row for row in rows if row.get("name") in chosen]


def _done(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("status", "ok") == "ok"]


def _middle(rows: Sequence[Row], column: str) -> float:
    """The median over those that have a number; NaN where none has."""
    known = [row[column] for row in rows if isinstance(row.get(column), int | float)]
    return float(median(known)) if known else math.nan


def _has_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _scalars(rows: Sequence[Row]) -> list[Row]:
    lists = {key for row in rows for key, value in row.items() if isinstance(value, list | dict)}
    return [{key: value for key, value in row.items() if key not in lists} for row in rows]


def _record(document: Document) -> dict[str, Any]:
    """What a command's document says of itself, in the words of `run.json`."""
    names = ("kind", "tuned", "base", "adapter", "merged", "options")
    inputs = {name: document[name] for name in names if document.get(name)}
    if isinstance(inputs.get("tuned"), list):
        inputs["tuned"] = ", ".join(map(str, inputs["tuned"]))
    coverage = document.get("coverage")
    return {
        "inputs": inputs,
        "versions": {"spectra": document["spectra"]} if "spectra" in document else {},
        **({"coverage": coverage} if is_coverage(coverage) else {}),
    }


def _over_depth(label: str, rows: Sequence[Row], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """A picture over layer × role for each of these columns that has a number."""
    panels = []
    for metric in metrics:
        known = [{"name": row["name"], metric: row.get(metric)} for row in rows]
        grid = depth_grid(known, metric)
        if grid.numbers.any() and len(grid.places) > 1:
            panels.append(cells.panel(label, grid, value_range([grid])) | {"metric": metric})
    return panels


def _alignment(document: Document, rows: Sequence[Row], label: str) -> Section:
    done = _done(rows)
    options = document.get("options", {})
    count = sum(row["intruders"] for row in done)
    told = [
        f"{count:,} intruder {'dimension' if count == 1 else 'dimensions'} in {text.matrices(len(done))}: of the top "
        f"{options.get('k', 'k')} directions of W, those whose cosine with every direction of W₀ is under "
        f"{options.get('epsilon', 'ε')}."
    ]
    for side in ("left", "right"):
        share, chance = _middle(done, f"{side}_in_top"), _middle(done, f"{side}_chance")
        told.append(
            f"W₀'s top {side} directions hold {text.figure(100 * share)} % of ‖ΔW‖² (median); by chance "
            f"{text.figure(100 * chance)} %."
        )
    own, by_chance = _middle(done, "amplification"), _middle(done, "amplification_random")
    told.append(
        f"ΔW is {text.figure(own)} times as large as W₀ is in ΔW's own top directions, and "
        f"{text.figure(by_chance)} times as in random ones (medians)."
    )
    return Section(
        "alignment", label, "What does it do to the model's own directions?",
        "Intruders are new main directions; shares say how much of the update's energy lies in the directions that the "
        "base uses most.",
        told, _scalars(rows), ("name", "role", "layer", "status", "k", "intruders", "amplification",
                               "amplification_random", "left_in_top", "left_chance", "right_in_top", "right_chance"),
        "alignment.csv", panels=_over_depth(label, done, ("intruders", "left_in_top", "right_in_top", "amplification")),
        record=_record(document),
    )  # fmt: skip


def _interference(document: Document, rows: Sequence[Row], label: str) -> Section:
    updates = short_names([str(name) for name in document.get("tuned", [])])
    done = [row for row in _done(rows) if row.get("cosines") is not None]
    squares, both = mean_squares(done), [row for row in done if _has_number(row.get("mean_cosine"))]
    told = []
    if squares:
        cosine, ratio = _middle(done, "mean_cosine"), _middle(done, "norm_ratio")
        told = [
            f"{len(updates)} updates; the cosine of two is {text.figure(cosine)} in the median over "
            f"{text.matrices(len(both))} (by chance 0); {most_alike(next(iter(squares.values())), updates)}.",
            f"‖ΣΔ‖²/Σ‖Δ‖² is {text.figure(ratio)} in the median: 1 where updates are orthogonal, {len(updates)} where "
            "they are equal.",
        ]
    return Section(
        "interference", label, "What does adding them up do to each?",
        "Cosines of every two updates, the mean over the matrices of a role; and per matrix what their sum keeps.",
        told, _scalars(rows), ("name", "role", "layer", "status", "mean_cosine", "norm_ratio", "sti", "mean_sar",
                               "sar_chance", "shared", "shared_null"),
        "interference.csv",
        squares=[_square(role, square, updates, (-1.0, 1.0)) for role, square in squares.items()],
        panels=_over_depth(label, done, ("norm_ratio", "mean_cosine", "sti")), record=_record(document),
    )  # fmt: skip


def _heads(document: Document, rows: Sequence[Row], label: str) -> Section:
    done = _done(rows)
    told = [
        f"The cosine of two heads is {text.figure(_middle(done, 'cosine'))} in the median over {len(done):,} "
        f"{'module' if len(done) == 1 else 'modules'}; that of random heads scatters by "
        f"{text.figure(_middle(done, 'chance'))} around 0."
    ]
    return Section(
        "heads", label, "Are the heads alike?", "Mean cosines of the heads B₁, B₂, … and of their updates B·A.",
        told, _scalars(rows), ("name", "role", "layer", "status", "heads", "cosine", "chance", "norm", "update_cosine"),
        "heads.csv", panels=_over_depth(label, done, ("cosine", "update_cosine")), record=_record(document),
    )  # fmt: skip


def _verify(document: Document, rows: Sequence[Row], label: str) -> Section:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    listed = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(counts.items(), key=lambda item: -item[1]))
    told = [f"The adapter in the merged model: {document.get('verdict', '?')}. {text.matrices(len(rows))}: {listed}."]
    if document.get("untouched"):
        told.append(f"{document['untouched']:,} weights that the adapter does not touch equal the base.")
    causes = dict.fromkeys(row["cause"] for row in rows if row.get("cause"))
    told += [f"Seen as the cause: {cause}" for cause in list(causes)[:3]]
    return Section(
        "verify", label, "Is the adapter in the merged model?",
        "residual is ‖M − W₀ − ΔW‖_F/‖ΔW‖_F, and rounding what storing the sum would leave of it by itself.",
        told, _scalars(rows), ("name", "role", "layer", "verdict", "scale", "residual", "rounding", "cause"),
        "verify.csv", panels=_over_depth(label, rows, ("residual", "rounding")), record=_record(document),
    )  # fmt: skip


def _series(document: Document, rows: Sequence[Row], label: str) -> Section:
    curves = by_role(rows)
    steps = sorted({row["step"] for row in curves})
    told = []
    if steps:
        told = [f"{len(steps)} checkpoints, from step {steps[0]:,} to {steps[-1]:,}; medians over all matrices:"]
        done = _done(rows)
        for metric, words in (("norm", "‖ΔW‖_F"), ("stable_rank", "the stable rank"),
                              ("top_1_share", "the share of the first direction")):  # fmt: skip
            ends = [_middle([row for row in done if row["step"] == step], metric) for step in (steps[0], steps[-1])]
            told.append(f"{words} goes from {text.figure(ends[0])} to {text.figure(ends[1])}.")
    shown = ("step", "role", "matrices", "norm", "stable_rank", "top_1_share", "effective_rank", "phi_to_last",
             "phi_to_last_chance", "start_left", "start_right")  # fmt: skip
    return Section(
        "series", label, "How did it come about?",
        "Medians over the matrices of a role, checkpoint by checkpoint; series.csv has every matrix.",
        told, curves, shown, "series.csv", panels=_along(curves, steps), record=_record(document),
    )  # fmt: skip


def _along(curves: Sequence[Row], steps: Sequence[int]) -> list[dict[str, Any]]:
    """Roles downwards, steps to the right."""
    roles = list(dict.fromkeys(row["role"] for row in curves))
    panels = []
    for metric in ("norm", "stable_rank", "top_1_share", "phi_to_last"):
        at = {(row["role"], row["step"]): row[metric] for row in curves if row.get(metric) is not None}
        if len(steps) < 2 or not at:
            continue
        limits = min(at.values()), max(at.values())
        lines = [
            {"role": role, "cells": [cells.cell(at.get((role, step)), limits) for step in steps]} for role in roles
        ]
        panels.append(cells.plain_panel(metric, "step", [f"{step:,}" for step in steps], lines, limits))
    return panels


def pairs_section(pairs: Pairs, label: str) -> Section:
    """Every two of several updates: φ(k, k) over all matrices, and by role."""
    names = short_names(pairs.labels)
    rows = [{key: value for key, value in row.items() if key != "matrices"} for row in pairs.pooled("role")]
    square = pairs.square(pairs.sides[0])
    groups = pairs.groups("role")
    roles = {str(role): pairs.square(pairs.sides[0], "role", role) for role in groups} if len(groups) > 1 else {}
    ordered = sorted(roles, key=[*ordered_rows(roles)].index) if set(ordered_rows(roles)) == set(roles) else list(roles)
    return Section(
        "pairs", label, "Which updates use the same directions?",
        "φ(k, k) of every two updates: 1 where one lies within the other's directions; the mean over matrices.",
        [f"φ(k, k) of {len(names)} updates, {pairs.sides[0]} vectors; {most_alike(square, names)}."],
        rows, tuple(rows[0]) if rows else (), "pooled.csv",
        squares=[_square(name, values, names, (0.0, 1.0))
                 for name, values in {"all matrices": square, **{role: roles[role] for role in ordered}}.items()],
    )  # fmt: skip


def _two_digits(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _square(title: str, square: np.ndarray, names: Sequence[str], limits: tuple[float, float]) -> dict[str, Any]:
    """A square as rows of cells: class and text."""
    rows = [
        (name, [("none", "") if math.isnan(value) else (f"h{cells.level(float(value), limits)}", _two_digits(value))
                for value in line])
        for name, line in zip(names, square, strict=True)
    ]  # fmt: skip
    return {
        "title": title,
        "rows": rows,
        "names": list(names),
        "low": text.figure(limits[0]),
        "high": text.figure(limits[1]),
    }


_SECTIONS: dict[str, Callable[[Document, Sequence[Row], str], Section]] = {
    "verify.json": _verify,
    SERIES: _series,
    "alignment.json": _alignment,
    "interference.json": _interference,
    "heads.json": _heads,
}
TABLES = tuple(_SECTIONS)
