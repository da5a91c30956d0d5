"""A metric over the model's depth: layer × role as a heatmap, or a line per role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from spectra.errors import SelectionError, refuse_path_for_spectra
from spectra.metrics import METRICS
from spectra.plots.panels import even_lines
from spectra.plots.places import Place, ordered_places, ordered_rows, place_of, row_of, stack_labels
from spectra.plots.style import HEATMAP, curves, hatch, marked, new_axes
from spectra.printing import in_figure, shortened
from spectra.results import tables
from spectra.results.collection import Spectra
from spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

Kind = Literal["heatmap", "lines"]
MOST_ROWS = 24
_WIDE = 30.0  # largest over smallest value from which on a scale is logarithmic
_WIDTH = 56  # characters that fit over and under axes of the usual size
_LONGEST_LABEL, _LONGEST_LINE = 40, 500  # characters
_LETTER = 0.47  # ems of a letter of such a name
_LABELS = 24  # numbers under the columns
_OF_PANEL, _SCALE = 0.75, 8  # the share of a panel that `width` is, and the letters that a colour bar takes of it
_OUTSIDE = 4  # matrices in no layer that are told
_PLACES = ("layer", "out", "in")  # columns of numbers that say which matrix it is
_APART = ("side", "step")  # columns of tables that hold a matrix several times


@dataclass(frozen=True, eq=False)
class DepthGrid:
    """A metric in numbers, layer by layer and role by role: what the picture shows is what `cells` lists.

    Attributes:
        metric: the column's name.
        rows: roles, from the top.
        places: layers, from the left.
        values: rows × places, the median over the cell's matrices that have a number; NaN where none has one.
        matrices: how many matrices a cell has; 0 where the layer has no such role.
        numbers: how many of them have a number.
        by_name: every matrix' own number, by its name.
        left_out: roles beyond the ones that stay readable.
        outside: role → median, of the matrices in no layer, where others are.
    """

    metric: str
    rows: tuple[str, ...]
    places: tuple[Place, ...]
    values: np.ndarray
    matrices: np.ndarray
    numbers: np.ndarray
    by_name: Mapping[str, float]
    left_out: tuple[str, ...] = ()
    outside: Mapping[str, float] = field(default_factory=dict)

    @property
    def unnumbered(self) -> np.ndarray:
        """Which cells have a matrix, but no number."""
        return (self.matrices > 0) & (self.numbers == 0)

    def cells(self) -> list[dict[str, Any]]:
        """One row per cell that has a matrix: role, stack, layer, value, matrices, and those with a number."""
        return [
            {
                "metric": self.metric,
                "role": self.rows[i],
                "stack": self.places[j].stack,
                "layer": self.places[j].label,
                "median": float(self.values[i, j]),
                "matrices": int(self.matrices[i, j]),
                "with_number": int(self.numbers[i, j]),
            }
            for i, j in zip(*np.nonzero(self.matrices), strict=True)
        ]


def depth_grid(table_or_spectra: Any, metric: str, *, like: Sequence[str] = ()) -> DepthGrid:
    """The numbers of `plot_depth`.

    Args:
        table_or_spectra: as for `plot_depth`.
        metric: as for `plot_depth`.
        like: names of matrices whose rows and columns the grid has, too, so that several grids line up.

    Raises:
        SelectionError: as for `plot_depth`.

    Example:
        >>> spectra = [Spectrum(f"layers.{i}.v_proj.weight", (2, 2), S=[i + 1.0, 0.0]) for i in range(2)]
        >>> depth_grid(spectra, "norm").values.tolist()
        [[1.0, 2.0]]
    """
    numbers = _numbers(depth_table(table_or_spectra, (metric,)), metric)
    named = [*like, *numbers]  # grids with the same `like` have its order, whichever of its matrices are theirs
    inside = [name for name in named if place_of(name).index]
    drawn = list(dict.fromkeys(inside or named))
    rows, places = ordered_rows(drawn), ordered_places(drawn)
    row_at = {row: i for i, row in enumerate(rows[:MOST_ROWS])}
    place_at = {place: j for j, place in enumerate(places)}
    cells: dict[tuple[int, int], list[float]] = {}
    outside: dict[str, list[float]] = {}
    for name, value in numbers.items():
        row, place = row_of(name), place_of(name)
        if place not in place_at:
            outside.setdefault(row, []).append(value)
        elif row in row_at:
            cells.setdefault((row_at[row], place_at[place]), []).append(value)
    values = np.full((len(row_at), len(places)), math.nan)
    matrices, with_number = (np.zeros(values.shape, dtype=int) for _ in range(2))
    for cell, members in cells.items():
        values[cell], matrices[cell], with_number[cell] = _median(members), len(members), np.isfinite(members).sum()
    return DepthGrid(
        metric, tuple(row_at), tuple(places), values, matrices, with_number, numbers, tuple(rows[MOST_ROWS:]),
        {row: _median(members) for row, members in outside.items()},
    )  # fmt: skip


def _median(members: Sequence[float]) -> float:
    known = [value for value in members if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


def depth_table(table_or_spectra: Any, metrics: Sequence[str] = ()) -> list[Mapping[str, Any]]:
    """A row per matrix, with these metrics of it, or with all; a table's rows are as they are."""
    table = table_or_spectra
    refuse_path_for_spectra(table, "plot_depth")
    if hasattr(table, "to_dict") and hasattr(table, "columns"):
        table = table.to_dict("records")
    elif isinstance(table, Spectra):
        table = table.without_vectors()
    wanted = {name: METRICS[name] for name in metrics or METRICS if name in METRICS}
    items = list(table)
    rows: list[Mapping[str, Any]] = [
        tables.row(item, wanted) if isinstance(item, Spectrum) else dict(item) for item in items
    ]
    if not rows:
        raise SelectionError("there is no matrix to draw over depth")
    if isinstance(items[0], Spectrum):
        for metric in metrics:
            _check_metric(metric, {**dict.fromkeys(METRICS, 0.0), **rows[0]})
    return rows


def _numbers(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Name → the metric's value, NaN where there is none."""
    numbers: dict[str, float] = {}
    for row in rows:
        if not isinstance(row.get("name"), str):
            raise SelectionError("the table has no column 'name': give one with a row per matrix (by='matrix')")
        _check_metric(metric, row)
        if row["name"] in numbers:
            apart = [f", such as {key}={row[key]!r}" for key in _APART if key in row]
            raise SelectionError(
                f"{row['name']} stands in the table several times: draw one part of it at a time{''.join(apart[:1])}"
            )
        numbers[row["name"]] = _number(row, metric)
    return numbers


def _check_metric(metric: str, row: Mapping[str, Any]) -> None:
    if metric not in row:
        numbers = [key for key, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)]
        known = ", ".join(key for key in numbers if key not in _PLACES)
        raise SelectionError(f"metric {metric!r} is not a column of numbers here; there are {known}")


def _number(row: Mapping[str, Any], metric: str) -> float:
    value = row[metric]
    if value is None:
        return math.nan
    if isinstance(value, bool | str) or not isinstance(value, int | float | np.number):
        raise SelectionError(f"metric {metric!r} of {row['name']} is {value!r}, not a number")
    return float(value)


def plot_depth(
    table_or_spectra: Any,
    metric: str,
    *,
    kind: Kind = "heatmap",
    limits: tuple[float, float] | None = None,
    like: Sequence[str] = (),
    title: str | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """A metric over layer × role: a heatmap, roles downwards and layers to the right; or a line per role.

    Where several matrices share a layer and a role (experts, cross-attention apart), their median is shown. A
    matrix without a number is hatched, and a layer without such a role stays empty. Layers come in the order of
    the data's flow, stack by stack: encoder before decoder, down before middle before up.

    Args:
        table_or_spectra: spectra, or a table with a row per matrix: `summarize`, `alignment`, `extract` and others.
        metric: a name of METRICS, or a column of numbers.
        kind: "heatmap" or "lines".
        limits: lowest and highest value of the scale, to share it among several axes; None for the values' own.
        like: names of matrices whose rows and columns are there, too, to line several axes up.
        title: instead of what the numbers say: where the metric is largest, and its median.
        colorbar: whether a heatmap has one.
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: there is no matrix, the table has no such column or several rows per matrix, or kind is neither.

    Example:
        >>> from matplotlib.figure import Figure
        >>> spectra = [Spectrum(f"layers.{i}.v_proj.weight", (2, 2), S=[i + 1.0, 0.0]) for i in range(2)]
        >>> ax = plot_depth(spectra, "norm", ax=Figure().subplots())
        >>> ax.images[0].get_array().tolist()
        [[1.0, 2.0]]
    """
    grid = depth_grid(table_or_spectra, metric, like=like)
    ax = draw_grid(grid, ax, kind=kind, limits=limits, colorbar=colorbar)
    put_title(grid, ax, finding(grid) if title is None else title)
    return ax


def put_title(grid: DepthGrid, ax: Axes, title: str, width: int = _WIDTH, **options: Any) -> None:
    """The title in lines of this many characters, clear of the stacks' names above the axes."""
    import matplotlib as mpl

    words = [text.get_text() for text in ax.texts if text.get_rotation()]
    em = float(mpl.rcParams["font.size"])
    above = _LETTER * em * max(map(len, words)) if words else 0.8 * em if _stacks(grid.places) else 0
    pad = (0.9 * em if above else 0.6 * em) + above
    told = [shortened(line, _LONGEST_LINE) for line in title.splitlines()]
    lines = [even_lines(line, width) for line in told]
    ax.set_title(in_figure("\n".join(lines)), pad=pad, **options)


def draw_grid(
    grid: DepthGrid,
    ax: Axes | None = None,
    *,
    kind: Kind = "heatmap",
    limits: tuple[float, float] | None = None,
    colorbar: bool = True,
    width: int = _WIDTH,
) -> Axes:
    """Draw what `depth_grid` holds, without a title; text below has lines of `width` characters."""
    if kind not in get_args(Kind):
        raise SelectionError(f"kind={kind!r} is not one of {', '.join(get_args(Kind))}")
    ax = new_axes(ax)
    (_draw_heatmap if kind == "heatmap" else _draw_lines)(grid, ax, limits or value_range([grid]), colorbar)
    _number_places(grid, ax, width)
    lines = [shortened(line, _LONGEST_LINE) for line in _below(grid, hatched=kind == "heatmap")]
    filled = "\n".join(even_lines(line, width) for line in lines)
    ax.set_xlabel(in_figure(filled))
    return ax


def ems_around(grid: DepthGrid, letters: int) -> float:
    """How much room the words above and below the axes need, in lines of so many letters."""
    upright = [_LETTER * len(label) for label in _upright(grid.places, letters)]
    lines = [shortened(line, _LONGEST_LINE) for line in _below(grid, hatched=True)]
    return max(upright, default=0.0) + 1.2 * sum(math.ceil(len(line) / letters) for line in lines)


def _below(grid: DepthGrid, hatched: bool) -> list[str]:
    """What stands below the axes: what the columns are, what is marked, and what has no column."""
    lines = ["layer" + ("   (hatched: no number)" if hatched and grid.unnumbered.any() else "")]
    if grid.outside:
        told = [f"{row} {'–' if math.isnan(value) else format(value, '.3g')}" for row, value in grid.outside.items()]
        more = f" and {len(told) - _OUTSIDE} more" if len(told) > _OUTSIDE else ""
        lines.append(f"in no layer: {', '.join(told[:_OUTSIDE])}{more}")
    return lines


def finding(grid: DepthGrid) -> str:
    """What a grid says in one line: its median, and where its largest value is.

    >>> finding(depth_grid([Spectrum("layers.3.v_proj.weight", (1, 1), S=[2.0])], "norm"))
    'norm: median 2, largest 2 in v_proj of layer 3'
    """
    shown = grid.metric.replace("_", " ")
    known = {name: value for name, value in grid.by_name.items() if math.isfinite(value)}
    places = set(grid.places)
    known = {name: value for name, value in known.items() if place_of(name) in places}
    if not known:
        return f"{shown}: no matrix has a number"
    largest = max(known, key=lambda name: known[name])
    median = float(np.median(list(known.values())))
    return f"{shown}: median {median:.3g}, largest {known[largest]:.3g} in {_where(grid, largest)}"


def _where(grid: DepthGrid, name: str) -> str:
    """Which matrix it is; of a cell of several, whose median is drawn, that it is one of them."""
    place, row = place_of(name), row_of(name)
    stack = stack_labels(grid.places)[place.stack]
    several = int(grid.matrices[grid.rows.index(row), grid.places.index(place)]) if row in grid.rows else 1
    called = f"{row} of {stack + ' ' if stack else ''}layer {place.label}" if place.index else row
    return f"{called} (one of {several:,})" if several > 1 else called


def value_range(grids: Iterable[DepthGrid]) -> tuple[float, float]:
    """The smallest and the largest value of several grids; 0 and 1 where there is none."""
    known = np.concatenate([grid.values[np.isfinite(grid.values)] for grid in grids])
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)


def is_wide(limits: tuple[float, float]) -> bool:
    """Whether a scale between these values has to be logarithmic to show the small ones."""
    return limits[0] > 0 and limits[1] / limits[0] > _WIDE


def scale(limits: tuple[float, float]) -> Normalize:
    """Value → place on the colour map: from zero where all are positive and alike, logarithmic over decades."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = limits
    if is_wide(limits):
        return LogNorm(low, high)
    from_zero = low <= high / 2 or low == high
    return Normalize(min(low, 0.0) if from_zero else low, max(high, 0.0) if high or low else 1.0)


def _draw_heatmap(grid: DepthGrid, ax: Axes, limits: tuple[float, float], colorbar: bool) -> None:
    ax.imshow(grid.values, cmap=HEATMAP, norm=scale(limits), aspect="auto", interpolation="nearest")
    hatch(ax, np.argwhere(grid.unnumbered))
    ax.set_yticks(range(len(grid.rows)), list(map(_label, grid.rows)))
    ax.grid(visible=False)
    if colorbar and ax.figure is not None:
        add_scale(grid, ax)


def add_scale(grid: DepthGrid, ax: Axes, others: Sequence[Axes] = ()) -> None:
    """The colour bar of a heatmap, which may stand for others beside it."""
    several = int(grid.matrices.max())
    label = grid.metric + (f"\nmedian of up to {several:,} matrices" if several > 1 else "")
    bar = ax.figure.colorbar(ax.images[0], ax=[ax, *others], pad=0.02)
    bar.set_label(label)
    bar.ax.tick_params(labelsize="small")


def _draw_lines(grid: DepthGrid, ax: Axes, limits: tuple[float, float], colorbar: bool) -> None:
    stacks = [place.stack for place in grid.places]
    for row, values, (colour, mark) in zip(grid.rows, grid.values, curves(), strict=False):
        if not np.isfinite(values).any():
            continue
        label: str | None = _label(row)
        for stack in dict.fromkeys(stacks):
            x = np.array([j for j, other in enumerate(stacks) if other == stack and np.isfinite(values[j])], dtype=int)
            if len(x):
                ax.plot(x, values[x], color=colour, label=label and _label(label), **marked(mark))
                label = None
    if is_wide(limits):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=min(0.0, 1.05 * limits[0]))
    ax.set_ylabel(grid.metric)
    ax.set_xlim(-0.5, len(grid.places) - 0.5)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _number_places(grid: DepthGrid, ax: Axes, width: int) -> None:
    """Layers' numbers below, and the stacks' names with lines between them where there are several."""
    places = grid.places
    turned = any(len(place.index) > 1 for place in places)
    step = max(math.ceil(len(places) / _LABELS), 1 if turned else _every(grid, width))
    shown = [j for j, place in enumerate(places) if place.index and (place.index[-1] if step > 1 else 0) % step == 0]
    ax.set_xticks(shown, [_label(places[j].label) for j in shown])
    if turned:
        ax.tick_params(axis="x", labelrotation=90)
    upright = _upright(places, width)
    for label, first, count in _stacks(places):
        if first:
            ax.axvline(first - 0.5, color="white", linewidth=3)
            ax.axvline(first - 0.5, color="0.35", linewidth=1)
        ax.annotate(
            _label(label), (first + (count - 1) / 2, 1.0), (0, 3), xycoords=ax.get_xaxis_transform(),
            textcoords="offset points", ha="center", va="bottom", fontsize="x-small", color="0.25",
            rotation=90 if label in upright else 0,
        )  # fmt: skip


def _every(grid: DepthGrid, width: int) -> int:
    """Of how many columns one is numbered, so that numbers do not touch: the names of roles and the scale take room."""
    names = max((len(_label(row)) for row in grid.rows), default=0)
    room = max(width / _OF_PANEL - names - _SCALE, 4.0)
    longest = max((len(_label(place.label)) for place in grid.places), default=0)
    return math.ceil((longest + 0.8) * len(grid.places) / room)


def _upright(places: Sequence[Place], width: int) -> set[str]:
    """The stacks' names that are longer than their columns, where all columns together hold `width` letters."""
    return {label for label, _, count in _stacks(places) if len(label) * len(places) > width * count}


def _label(name: str) -> str:
    """A name beside the data, which a stranger's must not push off the figure."""
    return in_figure(shortened(name, _LONGEST_LABEL))


def _stacks(places: Sequence[Place]) -> list[tuple[str, int, int]]:
    """Label, first column and number of columns of each stack; [] where there is one only."""
    labels = stack_labels(places)
    stacks = [place.stack for place in places]
    if not any(labels.values()):
        return []
    return [(labels[stack], stacks.index(stack), stacks.count(stack)) for stack in dict.fromkeys(stacks)]
