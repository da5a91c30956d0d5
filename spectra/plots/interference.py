"""Several updates of one base: cosines of every two by role, and what they do to each other over the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import SelectionError
from spectra.naming import in_model_order
from spectra.plots.figures import DEFAULT_FORMATS, save_figure
from spectra.plots.panels import above, ems_of_legend, panelled, put_label, put_legend_of, put_title
from spectra.plots.sizes import DEFAULT, arranged, size_of
from spectra.plots.squares import DIVERGING, most_alike, short_names, square_rows, squares_figure
from spectra.plots.style import curves, marked, new_axes, stroke
from spectra.printing import in_figure
from spectra.results.tables import to_csv
from spectra.results.writing import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
USUAL_TITLE = "over the layers; dotted: by chance"
_PANEL, _LETTERS = (18.0, 17.0), 18  # ems of a panel, and characters along its height
Rows = Iterable[Mapping[str, Any]]
# Column → what the axis says, and the column of its level by chance, or that level.
OVER_DEPTH: dict[str, tuple[str, str | float]] = {
    "mean_cosine": ("mean cosine of two updates", 0.0),
    "norm_ratio": ("‖ΣΔ‖² / Σ‖Δ‖²", 1.0),
    "sti": ("STI / Σσ", math.nan),
    "mean_sar": ("mean SAR", "sar_chance"),
    "shared": ("shared, mean apart", "shared_null"),
}


def plot_roles_over_depth(
    rows: Rows, *, column: str, label: str = "", chance: str | float = math.nan, ax: Axes | None = None
) -> Axes:
    """A number over the layers, a line per role; where a layer has several matrices of a role, their mean.

    Args:
        rows: a table with the columns role, layer and `column`, as rows or as a DataFrame.
        column: which number; rows without it are left out.
        label: of the axis; "" for the column's name.
        chance: the level by chance, or the column that holds it for each matrix; dotted.
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: no matrix in a layer has the number.
    """
    lines = _by_role(records(rows), column)
    if not lines:
        raise SelectionError(f"no matrix in a layer has a number in {column!r}")
    from matplotlib.ticker import MaxNLocator

    ax = new_axes(ax)
    levels = _by_role(records(rows), chance) if isinstance(chance, str) else {}
    for role, (colour, mark) in _looks(records(rows)).items():
        if role not in lines:
            continue
        values = lines[role]
        ax.plot(list(values), list(values.values()), color=colour, label=in_figure(role), **marked(mark))
        if role in levels:
            ax.plot(list(levels[role]), list(levels[role].values()), color=colour, linestyle=":", linewidth=stroke(0.6))
    if not isinstance(chance, str) and not math.isnan(chance):
        ax.axhline(chance, color="black", linestyle=":", linewidth=stroke(0.6))
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(in_figure(label or column))
    return ax


def cosines_figure(rows: Rows, labels: Sequence[str], *, title: str = "", size: str = DEFAULT) -> Figure:
    """The cosine of every two updates, a square per role, each the mean over the role's matrices.

    Args:
        rows: what `interference` gives.
        labels: what the updates are called.
        title: above all panels, and above which two updates have the largest one.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: no matrix has cosines.
    """
    squares, named = mean_squares(records(rows)), short_names(labels)
    found = f"cosines of updates; {most_alike(next(iter(squares.values())), named)}" if squares else ""
    return squares_figure(squares, named, title=above(title, found), label="cosine", limits=(-1.0, 1.0),
                          colours=DIVERGING, size=size)  # fmt: skip


def roles_over_depth_figure(
    rows: Rows,
    *,
    title: str = "",
    columns: Mapping[str, tuple[str, str | float]] = OVER_DEPTH,
    size: str = DEFAULT,
) -> Figure:
    """Numbers over the layers, a panel each with a line per role, and what chance would give, dotted.

    Args:
        rows: a table with role, layer and these columns.
        title: above all panels.
        columns: column → the axis' label, and the column or the number that is its level by chance.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: none of the columns has a number.
    """
    table = records(rows)
    drawn = {column: words for column, words in columns.items() if _by_role(table, column)}
    if not drawn:
        raise SelectionError("no matrix in a layer has a number to draw over the layers")
    legend = ems_of_legend(
        dict.fromkeys(role for column in drawn for role in _by_role(table, column)), size_of(size).usual
    )
    layout = arranged(size, len(drawn), _PANEL, above=3.5 + legend, most=_COLUMNS, stretched=True)
    with panelled(layout, title=title or USUAL_TITLE) as (figure, axes):
        for ax, (column, (label, chance)) in zip(axes, drawn.items(), strict=False):
            plot_roles_over_depth(table, column=column, label=label, chance=chance, ax=ax)
            put_label(ax, label, _LETTERS)
            put_title(ax, _median(table, column), layout)
        put_legend_of(figure, axes, layout)
    return figure


def _looks(table: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Role → its colour and mark, the same whichever number is drawn."""
    there = in_model_order(dict.fromkeys(row["role"] for row in table if _number(row.get("layer")) is not None))
    return dict(zip(there, curves(), strict=False))


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _median(table: Sequence[Mapping[str, Any]], column: str) -> str:
    """What a panel says in a word: the median over everything that it draws."""
    drawn = [value for values in _by_role(table, column).values() for value in values.values()]
    return f"median {np.median(drawn):.3g}"


def mean_squares(table: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """ "all" and every role → the mean of the cosines' squares over its matrices, where updates have them."""
    groups: dict[str, list[np.ndarray]] = {"all": []}
    for row in table:
        if row.get("cosines") is not None:
            square = np.array(row["cosines"], dtype=float)
            if np.isnan(square).all():
                continue  # no update changes this matrix
            groups["all"].append(square)
            groups.setdefault(row["role"], []).append(square)
    if len(groups) == 2:
        del groups["all"]
    ordered = ["all", *in_model_order(role for role in groups if role != "all")]
    return {role: _mean(groups[role]) for role in ordered if groups.get(role)}


def draw_interference(
    rows: Rows,
    out: str | Path,
    labels: Sequence[str],
    *,
    title: str = "",
    formats: Sequence[str] = DEFAULT_FORMATS,
    size: str = DEFAULT,
    end: str = "",
) -> list[Path]:
    """Draw what `interference` gives into a directory: `cosines` and `interference_depth`, each with its csv.

    Args:
        rows: its rows.
        out: the directory.
        labels: what the updates are called.
        title: above each figure.
        formats: what to write each as: "png", "pdf" or "svg".
        size: "column", "page" or "slide".
        end: what the files' names end in, where those of other updates lie beside them.

    Returns:
        The files that were written.
    """
    table, target = records(rows), Path(out)
    squares = mean_squares(table)
    if not squares:
        return []
    numbers = target / f"cosines{end}.csv"
    write(numbers, to_csv(square_rows(squares, labels, "cosine")).encode())
    figure = cosines_figure(table, labels, title=title, size=size)
    files = [*save_figure(figure, target / f"cosines{end}", formats), numbers]
    if any(_by_role(table, column) for column in OVER_DEPTH):
        path = target / f"interference_depth{end}"
        figure = roles_over_depth_figure(table, title=above(title, USUAL_TITLE) if title else "", size=size)
        files += [*save_figure(figure, path, formats), write_over_depth(table, OVER_DEPTH, path)]
    return files


def write_over_depth(
    table: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str | float]], path: Path
) -> Path:
    """The numbers of `roles_over_depth_figure` into a csv of this name: a row per role and layer."""
    levels = [level for _, level in columns.values() if isinstance(level, str)]
    by_column = {column: _by_role(table, column) for column in [*columns, *levels]}
    drawn = {column: by_role for column, by_role in by_column.items() if by_role}
    places = dict.fromkeys((role, layer) for by_role in drawn.values() for role in by_role for layer in by_role[role])
    rows = [
        {"role": role, "layer": layer}
        | {column: by_role.get(role, {}).get(layer, math.nan) for column, by_role in drawn.items()}
        for role, layer in places
    ]
    numbers = path.with_name(f"{path.name}.csv")
    write(numbers, to_csv(rows).encode())
    return numbers


def records(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows of a table, or of a DataFrame."""
    return rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)


def _mean(squares: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over those that have a number; NaN where none has."""
    stacked = np.stack(squares)
    known = ~np.isnan(stacked)
    counts = known.sum(0)
    return np.where(counts, np.where(known, stacked, 0.0).sum(0) / np.maximum(counts, 1), np.nan)


def _by_role(table: Sequence[Mapping[str, Any]], column: str) -> dict[str, dict[int, float]]:
    """Role → layer → the mean of a column; of matrices in layers that have a number there."""
    by_role: dict[str, dict[int, list[float]]] = {}
    for row in table:
        value, layer = _number(row.get(column)), _number(row.get("layer"))
        if value is not None and layer is not None:
            by_role.setdefault(row["role"], {}).setdefault(int(layer), []).append(value)
    return {
        role: {layer: math.fsum(values) / len(values) for layer, values in sorted(by_role[role].items())}
        for role in in_model_order(by_role)
    }
