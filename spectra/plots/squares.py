"""Several updates, every two of them as a cell: N×N heatmaps of one number, a panel per role or layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from spectra.errors import SelectionError
from spectra.metrics.similarity import Side
from spectra.plots.panels import above, panelled
from spectra.plots.sizes import DEFAULT, arranged, size_of
from spectra.plots.style import HEATMAP, hatch, new_axes
from spectra.printing import in_figure, shortened
from spectra.results.pairs import Pairs, Pooling
from spectra.results.partners import alike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Item = TypeVar("_Item")
DIVERGING = "RdBu_r"
MOST_PANELS = 24
_MOST_WRITTEN = 6  # updates up to which each cell has its number written in it
_WRITTEN_SIGN = 0.05  # share of the scale from which on a negative number is marked where it is not written
_LONGEST = 20  # characters of an update's name
_COLUMNS = 6
_SIDE, _CELL, _LONGEST_SIDE, _BAR = 11.0, 2.6, 28.0, 6.0  # ems


def plot_square(
    square: np.ndarray,
    *,
    labels: Sequence[str] | None = None,
    title: str = "",
    label: str = "",
    limits: tuple[float, float] = (0.0, 1.0),
    colours: str = HEATMAP,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Heatmap of a number of every two updates, rows and columns in the order given.

    Args:
        square: (N, N); NaN makes a cell hatched.
        labels: what the updates are called, on the left beside their numbers; None for numbers only.
        title: above.
        label: what the number is, for the colour bar.
        limits: the numbers at the two ends of the colours.
        colours: a matplotlib colour map.
        colorbar: whether to add one.
        ax: where to draw; None for a new figure.

    Raises:
        SelectionError: the labels do not fit the square.
    """
    count = len(square) if labels is None else len(labels)
    if square.shape != (count, count):
        raise SelectionError(f"{count} labels for a square of {square.shape}: give one for each update")
    ax = new_axes(ax)
    low, high = limits
    image = ax.imshow(square, vmin=low, vmax=high, cmap=colours, interpolation="nearest")
    ax.grid(visible=False)
    numbers = [str(i + 1) for i in range(count)]
    size = "small" if count <= 12 else "x-small"
    ax.set_xticks(range(count), numbers, fontsize=size)
    named = (
        [in_figure(f"{shortened(name, _LONGEST)} ({i})") for i, name in zip(numbers, labels, strict=True)]
        if labels is not None
        else numbers
    )
    ax.set_yticks(range(count), named, fontsize=size)
    ax.set_title(in_figure(title), fontsize="small")
    hatch(ax, np.argwhere(np.isnan(square)))
    if count <= _MOST_WRITTEN:
        for (i, j), value in np.ndenumerate(square):
            if not math.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                written = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
                ax.text(j, i, written, ha="center", va="center", fontsize="x-small", color="white" if dark else "black")
    elif low < 0:  # which grey print does not tell from the positive
        for i, j in np.argwhere(square < _WRITTEN_SIGN * low):
            ax.text(
                j,
                i,
                "−",
                ha="center",
                va="center",
                fontsize="x-small",
                color="white" if square[i, j] < 0.6 * low else "black",
            )
    if colorbar and ax.figure is not None:
        ax.figure.colorbar(image, ax=ax, label=in_figure(label))
    return ax


def squares_figure(
    squares: Mapping[str, np.ndarray],
    labels: Sequence[str],
    *,
    title: str = "",
    label: str = "",
    limits: tuple[float, float] = (0.0, 1.0),
    colours: str = HEATMAP,
    size: str = DEFAULT,
) -> Figure:
    """Several `plot_square` under one colour scale, names at the left of each row.

    Args:
        squares: title → square; at most `MOST_PANELS` of them, evenly chosen, the first always.
        labels: what the updates are called.
        title: above all panels.
        label: what the number is.
        limits: as for `plot_square`.
        colours: as for `plot_square`.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: there is nothing to draw.
    """
    if not squares:
        raise SelectionError("there are no two updates to draw")
    drawn = dict(evenly(list(squares.items()), MOST_PANELS))
    beside = _BAR + 0.55 * max(map(len, labels))
    side = max(_SIDE, min(_CELL * len(labels), _LONGEST_SIDE, size_of(size).widest - beside))
    above = 3.0 if title else 0.0
    layout = arranged(size, len(drawn), (side, side + 3.5), beside=beside, above=above, most=_COLUMNS)
    with panelled(layout, title=title, squares=True) as (figure, axes):
        for place, (ax, (name, square)) in enumerate(zip(axes, drawn.items(), strict=False)):
            named = labels if place % layout.columns == 0 else None
            plot_square(square, labels=named, title=name, limits=limits, colours=colours, colorbar=False, ax=ax)
        figure.colorbar(axes[0].images[0], ax=axes, label=in_figure(label), shrink=1.8 / max(layout.rows, 2))
    return figure


def pairs_figure(
    pairs: Pairs,
    *,
    side: Side | None = None,
    by: Pooling = "role",
    clustered: bool = False,
    title: str = "",
    size: str = DEFAULT,
) -> Figure:
    """φ(k, k) of every two updates: over all matrices, and a panel per role or layer.

    Args:
        pairs: what `Pairs(compare_all(…))` holds.
        side: which; None for all that were compared.
        by: "role" or "layer".
        clustered: whether the updates that share directions stand together.
        title: above all panels, and above which two updates are the most alike.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: nothing was compared.
    """
    sides = (side,) if side else pairs.sides
    there = short_names(pairs.labels)
    order = pairs.order(side) if clustered else list(range(len(pairs.labels)))
    squares: dict[str, np.ndarray] = {}
    for one in sides:
        end = f", {one}" if len(sides) > 1 else ""
        squares |= {f"all{end}{_facts(pairs, one)}": pairs.square(one)}
        groups = pairs.groups(by)
        if len(groups) > 1:
            squares |= {f"{_called(by, group)}{end}{_facts(pairs, one, by, group)}": pairs.square(one, by, group)
                        for group in evenly(groups, MOST_PANELS // len(sides) - 1)}  # fmt: skip
    ordered = {name: square[np.ix_(order, order)] for name, square in squares.items()}
    heading = f"φ(k, k), {' and '.join(sides)} singular vectors; {most_alike(pairs.square(sides[0]), there)}"
    shown, there_are = len(squares) // len(sides) - 1, len(pairs.groups(by))
    heading += f" ({shown} of {there_are} {by}s)" if 0 < shown < there_are else ""
    top = _largest(ordered.values())
    label = "φ(k, k)" if top == 1 else "φ(k, k) of two updates (the diagonal is 1)"
    return squares_figure(ordered, [there[i] for i in order], title=above(title, heading), label=label,
                          limits=(0.0, top), size=size)  # fmt: skip


def most_alike(square: np.ndarray, labels: Sequence[str]) -> str:
    """Which two of several have the largest number, in words; "" where no two have one.

    >>> most_alike(np.array([[1.0, 0.2, 0.7], [0.2, 1.0, 0.1], [0.7, 0.1, 1.0]]), ["a", "b", "c"])
    'most alike: a and c, 0.7'
    """
    pairs = [(i, j) for i in range(len(square)) for j in range(i) if not math.isnan(square[i, j])]
    if not pairs:
        return ""
    i, j = max(pairs, key=lambda pair: square[pair])
    return f"most alike: {labels[j]} and {labels[i]}, {square[i, j]:.2g}"


def _largest(squares: Iterable[np.ndarray]) -> float:
    """The upper end of the colours: 1, or less where no two updates come near that, so that they are told apart."""
    apart = [square[~np.eye(len(square), dtype=bool)] for square in squares]
    values = np.concatenate(apart)
    most = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    return 1.0 if most > 0.5 else max(math.ceil(most * 20) / 20, 0.05)


def square_rows(squares: Mapping[str, np.ndarray], labels: Sequence[str], value: str) -> list[dict[str, str | float]]:
    """The numbers of squares: panel, a, b and the value, a row for each two updates that have one."""
    return [
        {"panel": name.splitlines()[0], "a": labels[i], "b": labels[j], value: float(square[i, j])}
        for name, square in squares.items()
        for i in range(len(labels))
        for j in range(i + 1, len(labels))
        if not math.isnan(square[i, j])
    ]


def short_names(labels: Sequence[str]) -> list[str]:
    """What tells the updates apart in their paths: without the folders that all of them share, in front or behind.

    >>> short_names(["runs/a/step-9", "runs/b/step-9"]), short_names(["runs/a", "b"])
    (['a', 'b'], ['runs/a', 'b'])
    """
    parts = [Path(label).parts or (label,) for label in labels]
    front, back = alike(*parts), alike(*(part[::-1] for part in parts))
    kept = [part[front : len(part) - back] or part[-1:] for part in parts]
    return _told_apart(["/".join(part) for part in kept])


def _told_apart(names: Sequence[str]) -> list[str]:
    """Each within `_LONGEST` characters, around where they differ if their ends alone would be the same."""
    ends = [name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :] for name in names]
    if len(set(ends)) == len(set(names)):
        return ends
    middles = [shortened(name, _LONGEST) for name in names]
    if len(set(middles)) == len(set(names)):
        return middles
    front = max(alike(*names) - _LONGEST // 2, 0)
    cut = [f"{'…' if front else ''}{name[front:]}" for name in names]
    return [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in cut]


def evenly(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most so many of them, evenly chosen, the first and the last always.

    >>> evenly(list("abcdefg"), 3)
    ['a', 'd', 'g']
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


def _called(by: Pooling, group: str | int | None) -> str:
    return f"layer {group}" if by == "layer" and group is not None else "no layer" if group is None else str(group)


def _facts(pairs: Pairs, side: Side, by: Pooling = "all", group: str | int | None = "all") -> str:
    """k and chance, as ranges over the pairs."""
    upper = np.triu_indices(len(pairs.labels), 1)
    k = pairs.square(side, by, group, value="k_used")[upper]
    chance = pairs.square(side, by, group, value="chance")[upper]
    if np.isnan(k).all():
        return ""
    return f"\nk = {_range(k, '.0f')}, chance {_range(chance, '.2g')}"


def _range(values: np.ndarray, how: str) -> str:
    low, high = f"{np.nanmin(values):{how}}", f"{np.nanmax(values):{how}}"
    return low if low == high else f"{low} to {high}"
