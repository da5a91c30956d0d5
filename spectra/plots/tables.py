"""The figures of stored tables: a series' curves, an alignment's cosines and deciles, a merge's verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra import naming
from spectra.errors import SelectionError
from spectra.plots.alignment import alignment_numbers, deciles_figure, tops_figure, undrawn_roles
from spectra.plots.figures import save_figure
from spectra.plots.series import left_out_roles, series_curves, series_figure
from spectra.plots.verdicts import verdicts_figure
from spectra.results.documents import damaged, read_document
from spectra.results.series import COLUMNS, MEASURED, TABLE, is_series
from spectra.results.tables import to_csv
from spectra.results.writing import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ALIGNMENT_TABLE = "alignment.json"
VERIFIED = "verify.json"


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
    directory: Path, target: str | Path, layers: str | Sequence[str], label: str, style: Style
) -> Drawn | None:
    """Draw the tables that a directory holds; None where there is none.

    Args:
        directory: where they are.
        target: where to put figures.
        layers: only these matrices.
        label: what tells the figures' files from those of other directories; "" for nothing.
        style: of the figures.
    """
    drawers = [_draw_series] if is_series(directory) else []
    drawers += [_draw_alignment] if (directory / ALIGNMENT_TABLE).is_file() else []
    drawers += [_draw_verdicts] if (directory / VERIFIED).is_file() else []
    if not drawers:
        return None
    drawn = [draw(directory, Path(target), layers, label, style) for draw in drawers]
    return Drawn(tuple(file for one in drawn for file in one.files), tuple(note for one in drawn for note in one.notes))


def _draw_series(directory: Path, target: Path, layers: str | Sequence[str], label: str, style: Style) -> Drawn:
    """The curves of a stored series, from its table; several of them into files of their own labels."""
    table = _stored_series(directory / TABLE)
    if layers:
        chosen = naming.select(layers, dict.fromkeys(table["name"].dropna()))
        table = table[table["name"].isin(chosen)]
    name = f"series-{label}" if label else "series"
    try:
        figure = series_figure(table, title=style.title or label, size=style.size)
    except SelectionError as problem:
        return Drawn((), (f"no curves of {directory}: {problem}",))
    files = style.keep(figure, target / name, series_curves(table), target / f"{name}_curves.csv")
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


def _draw_alignment(directory: Path, target: Path, layers: str | Sequence[str], label: str, style: Style) -> Drawn:
    """The two figures of a stored alignment, from its table."""
    import pandas as pd

    table = pd.DataFrame(read_document(directory / ALIGNMENT_TABLE)["matrices"])
    if layers:
        table = table[table["name"].isin(naming.select(layers, table["name"]))]
    end = f"-{label}" if label else ""
    try:
        options: dict[str, Any] = {"title": style.title or label, "size": style.size}
        figures = tops_figure(table, **options), deciles_figure(table, **options)
    except SelectionError as problem:
        return Drawn((), (f"no figure of {directory}: {problem}",))
    files: list[Path] = []
    for name, figure, rows in zip(("cosines", "deciles"), figures, alignment_numbers(table), strict=True):
        path = target / f"alignment_{name}{end}"
        files += style.keep(figure, path, rows, path.with_name(f"{path.name}.csv"))
    return Drawn(tuple(files), too_many(undrawn_roles(table)))


def _draw_verdicts(directory: Path, target: Path, layers: str | Sequence[str], label: str, style: Style) -> Drawn:
    """What each matrix of a verified merge is."""
    rows = read_document(directory / VERIFIED)["matrices"]
    chosen = set(naming.select(layers or "*", [row["name"] for row in rows]))
    kept = [row for row in rows if row["name"] in chosen]
    path = target / (f"verdicts-{label}" if label else "verdicts")
    figure = verdicts_figure(kept, title=style.title or label, size=style.size)
    return Drawn(tuple(style.keep(figure, path, kept, path.with_name(f"{path.name}.csv"))))


def too_many(roles: Sequence[str]) -> tuple[str, ...]:
    """What to say of roles that a figure has no room for."""
    listed = f"not drawn, to keep the figure readable: {', '.join(roles)}; draw them with layers= (--layer)"
    return (listed,) if roles else ()
