"""The figures of several updates' comparison, written into its results directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectra.metrics.similarity import Side, pool
from spectra.plots.figures import DEFAULT_FORMATS, save_figure, similarity_figure
from spectra.plots.grouping import Comparison, panels_by_role
from spectra.plots.similarity import grid_rows
from spectra.plots.sizes import DEFAULT
from spectra.plots.squares import pairs_figure, short_names, square_rows
from spectra.results.pair_folders import PAIRS, pair_folder
from spectra.results.pairs import Pairs
from spectra.results.store import Store
from spectra.results.tables import to_csv
from spectra.results.writing import write

_MOST_ROWS = 3  # roles and sides below each other
_MOST_SIDE_BY_SIDE = 6  # pairs whose heatmaps fit beside each other


def draw_pairs(
    directory: str | Path,
    pairs: Pairs,
    *,
    out: str | Path | None = None,
    sides: Sequence[Side] = ("left",),
    clustered: bool = False,
    title: str = "",
    formats: Sequence[str] = DEFAULT_FORMATS,
    size: str = DEFAULT,
    end: str = "",
) -> list[Path]:
    """Draw every two updates as a cell, by role and by layer; up to six pairs as heatmaps of φ(i, j) side by side.

    Args:
        directory: what `compare_all(…, out=)` made.
        pairs: what is in it.
        out: where to put figures; None for the directory.
        sides: which sides.
        clustered: whether the updates that share directions stand together.
        title: above each figure.
        formats: what to write each figure as: "png", "pdf" or "svg".
        size: "column", "page" or "slide".
        end: what the files' names end in, where those of other updates lie beside them.

    Returns:
        The files that were written: figures, and the numbers behind them as csv.
    """
    target = Path(directory if out is None else out)
    target.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for by in ("role", "layer"):
        if by == "layer" and len(pairs.groups("layer")) < 2:
            continue
        figure = pairs_figure(pairs, by=by, clustered=clustered, title=title, size=size)
        files += save_figure(figure, target / f"similarity_by_{by}{end}", formats)
    squares = {f"{by} {group}, {side}": pairs.square(side, by, group)
               for side in sides for by in ("all", "role", "layer") for group in pairs.groups(by)}  # fmt: skip
    table = target / f"similarity_squares{end}.csv"
    write(table, to_csv(square_rows(squares, pairs.labels, "phi")).encode())
    files.append(table)
    comparisons = _comparisons(Path(directory), pairs, sides)
    if comparisons:
        panels = panels_by_role(comparisons)
        figure = similarity_figure(panels.similarities, title=title, labels=panels.labels, size=size)
        table = target / f"similarity_grid{end}.csv"
        write(table, to_csv(grid_rows(panels.similarities)).encode())
        files += [*save_figure(figure, target / f"similarity{end}", formats), table]
    return files


def _comparisons(directory: Path, pairs: Pairs, sides: Sequence[Side]) -> list[Comparison]:
    """What the heatmaps of φ(i, j) show, a column per pair: by role where there are few, else over all matrices."""
    names = dict(zip(pairs.labels, short_names(pairs.labels), strict=True))
    rows = pairs.rows()
    drawn = list(dict.fromkeys((row["a"], row["b"]) for row in rows))
    if not 0 < len(drawn) <= _MOST_SIDE_BY_SIDE:
        return []
    wanted = {(row["a"], row["b"], row["name"], row["other"], row["side"]) for row in rows}
    by_role = len(pairs.groups("role")) * len(sides) <= _MOST_ROWS
    comparisons = []
    for a, b in drawn:
        stored = Store(directory / PAIRS / pair_folder(a, b)).similarities()
        items = [item for item in stored if (a, b, item.name, item.other, item.side) in wanted]
        if not by_role:
            items = [pool([item for item in items if item.side == side], "all matrices") for side in sides]
        comparisons.append(Comparison(f"{names[a]}, {names[b]}", (names[a], names[b]), items))
    return comparisons
