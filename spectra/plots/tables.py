"""The figures of stored tables: each command that keeps one has its line in `_DRAWERS`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra import naming
from spectra.errors import SelectionError
from spectra.metrics.similarity import SIDES
from spectra.plots.alignment import alignment_numbers, deciles_figure, tops_figure, undrawn_roles
from spectra.plots.depth import depth_grid
from spectra.plots.figures import depth_figure, save_figure
from spectra.plots.heads import draw_heads
from spectra.plots.interference import draw_interference
from spectra.plots.series import left_out_roles, series_curves, series_figure
from spectra.plots.several import draw_pairs
from spectra.plots.verdicts import verdicts_figure
from spectra.results.documents import damaged, read_document
from spectra.results.pair_folders import load_pairs
from spectra.results.series_table import COLUMNS, MEASURED, TABLE, is_series
from spectra.results.store import Store
from spectra.results.tables import to_csv
from spectra.results.writing import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_LONGEST_FILE = 60  # characters of a label in a file's name
Layers = str | Sequence[str]


@dataclass(frozen=True)
class Style:
    """What all figures of a call have in common.

    Attributes:
        title: above each; "" for what its numbers say alone.
        formats: what to write each as.
        size: how large they are.
    """

    title: str
    formats: Sequence[str]
    size: str

    def keep(self, figure: Figure, path: Path, rows: list[dict[str, Any]], table: Path) -> list[Path]:
        """Save a figure and the numbers that it shows, and give the files."""
        write(table, to_csv(rows).encode())  # makes the directory, too
        return [*save_figure(figure, path, self.formats), table]


@dataclass(frozen=True)
class Drawn:
    """What `draw_results` did.

    Attributes:
        files: figures and tables that were written.
        notes: what was not drawn, and why, in sentences.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def draw_tables(
    directory: Path, target: str | Path, layers: Layers, sides: Sequence[str], label: str, style: Style
) -> Drawn | None:
    """Draw the tables that a directory holds; None where there is none.

    Args:
        directory: where they are.
        target: where to put figures.
        layers: only these matrices.
        sides: of the similarities of several updates.
        label: what tells the figures, and their files, from those of other directories; "" for nothing.
        style: of the figures.

    Raises:
        SelectionError: layers means none of the matrices of a table.
        StoreError: a table is damaged.
    """
    drawn: list[Drawn] = []
    store = Store(directory)
    directory = store.directory  # which is a place that can be
    style = replace(style, title=": ".join(filter(None, [style.title, label])))
    end = f"-{file_name(label)}" if label else ""
    for table, draw in _DRAWERS.items():
        if (directory / table).is_file():
            rows, document = _chosen(directory / table, layers)
            try:
                drawn.append(draw(rows, document, Path(target), end, style))
            except SelectionError as problem:
                drawn.append(Drawn((), (f"no figure of {directory / table}: {problem}",)))
    if is_series(directory):
        drawn.append(_draw_series(directory, Path(target), layers, end, style))
    if store.run().get("pairs"):
        drawn.append(_draw_pairs(directory, Path(target), layers, sides, end, style))
    if not drawn:
        return None
    return Drawn(tuple(file for one in drawn for file in one.files), tuple(note for one in drawn for note in one.notes))


def _chosen(path: Path, layers: Layers) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """The rows of a table that the layers mean, and all that it says."""
    document = read_document(path)
    try:
        rows = list(document["matrices"])
        chosen = set(naming.select(layers or "*", [row["name"] for row in rows]))
    except KeyError as problem:
        raise damaged(path, f"it lacks {problem}") from None
    return [row for row in rows if row["name"] in chosen], document


def file_name(label: str) -> str:
    """What is called after a label; a long one is cut, with a few digits that tell it apart.

    >>> file_name("runs/a, layer 3")
    'runs-a-layer-3'
    """
    plain = re.sub(r"[^\w.]+", "-", label)
    if len(plain) <= _LONGEST_FILE:
        return plain
    return f"{plain[:_LONGEST_FILE]}~{hashlib.sha256(label.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


def _draw_pairs(directory: Path, target: Path, layers: Layers, sides: Sequence[str], end: str, style: Style) -> Drawn:
    """Every two of several updates as a cell."""
    pairs = load_pairs(directory, layers=layers, sides=[side for side in SIDES if side in sides])
    files = draw_pairs(directory, pairs, out=target, sides=pairs.sides, title=style.title, formats=style.formats,
                       size=style.size, end=end)  # fmt: skip
    return Drawn(tuple(files))


def _draw_series(directory: Path, target: Path, layers: Layers, end: str, style: Style) -> Drawn:
    """The curves of a stored series, from its table."""
    table = _stored_series(directory / TABLE)
    if layers:
        chosen = naming.select(layers, dict.fromkeys(table["name"].dropna()))
        table = table[table["name"].isin(chosen)]
    try:
        figure = series_figure(table, title=style.title, size=style.size)
    except SelectionError as problem:
        return Drawn((), (f"no curves of {directory}: {problem}",))
    files = style.keep(figure, target / f"series{end}", series_curves(table), target / f"series{end}_curves.csv")
    return Drawn(tuple(files), too_many(left_out_roles(table)))


def _stored_series(path: Path) -> DataFrame:
    """The table as `series` writes it.

    Raises:
        StoreError: it is damaged.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
        lacking = [name for name in COLUMNS if name not in table]
        if lacking:
            raise ValueError(f"it lacks the column {lacking[0]}")
        return table.assign(**{name: pd.to_numeric(table[name]) for name in ("step", "layer", "k", *MEASURED)})
    except (OSError, ValueError) as problem:
        raise damaged(path, problem) from None


Rows = list[dict[str, Any]]


def _draw_alignment(rows: Rows, _: Mapping[str, Any], target: Path, end: str, style: Style) -> Drawn:
    """The cosines of W's top directions with W₀'s, and where in W₀'s spectrum the energy lies."""
    import pandas as pd

    table = pd.DataFrame(rows)
    options: dict[str, Any] = {"title": style.title, "size": style.size}
    figures = tops_figure(table, **options), deciles_figure(table, **options)
    files: list[Path] = []
    for name, figure, numbers in zip(("cosines", "deciles"), figures, alignment_numbers(table), strict=True):
        path = target / f"alignment_{name}{end}"
        files += style.keep(figure, path, numbers, path.with_name(f"{path.name}.csv"))
    return Drawn(tuple(files), too_many(undrawn_roles(table)))


def _draw_intruders(rows: Rows, _: Mapping[str, Any], target: Path, end: str, style: Style) -> Drawn:
    """How many intruders each matrix has, over the layers."""
    figure = depth_figure(rows, "intruders", title=style.title, size=style.size)
    path = target / f"intruders_depth{end}"
    return Drawn(
        tuple(style.keep(figure, path, depth_grid(rows, "intruders").cells(), path.with_name(f"{path.name}.csv")))
    )


def _draw_verdicts(rows: Rows, _: Mapping[str, Any], target: Path, end: str, style: Style) -> Drawn:
    """What each matrix of a verified merge is."""
    path = target / f"verdicts{end}"
    figure = verdicts_figure(rows, title=style.title, size=style.size)
    return Drawn(tuple(style.keep(figure, path, rows, path.with_name(f"{path.name}.csv"))))


def _draw_interference(rows: Rows, document: Mapping[str, Any], target: Path, end: str, style: Style) -> Drawn:
    """Cosines of every two updates, and what they do to each other over the layers."""
    updates = list(map(str, document.get("tuned", ())))
    files = draw_interference(rows, target, updates, title=style.title, formats=style.formats, size=style.size, end=end)
    if not files:
        raise SelectionError("no matrix has numbers of two updates")
    return Drawn(tuple(files))


def _draw_heads(rows: Rows, _: Mapping[str, Any], target: Path, end: str, style: Style) -> Drawn:
    """How alike heads are, over the layers."""
    options: dict[str, Any] = {"title": style.title, "formats": style.formats, "size": style.size, "end": end}
    return Drawn(tuple(draw_heads(rows, target, **options)))


_DRAWERS: Mapping[str, Callable[[Rows, Mapping[str, Any], Path, str, Style], Drawn]] = {
    "alignment.json": _draw_alignment,
    "intruders.json": _draw_intruders,
    "verify.json": _draw_verdicts,
    "interference.json": _draw_interference,
    "heads.json": _draw_heads,
}


def too_many(roles: Sequence[str]) -> tuple[str, ...]:
    """What to say of roles that a figure has no room for."""
    listed = f"not drawn, to keep the figure readable: {', '.join(roles)}; draw them with layers= (--layer)"
    return (listed,) if roles else ()
