"""What `spectra similarity` does with more than two updates."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.cli import report
from spectra.cli.table import Layout, View, print_rows
from spectra.cli.talk import say

if TYPE_CHECKING:
    from spectra.deltas.source import Source
    from spectra.metrics.similarity import Side
    from spectra.results.collection import Spectra
    from spectra.results.pairs import Pairs

_STATUSES = ("failed", "unchanged", "one_sided")
_MOST_SQUARE = 8  # updates whose square fits into a terminal


@dataclass(frozen=True)
class Wanted:
    """What the command was told to compare and to leave behind."""

    top: int
    sides: tuple[Side, ...]
    out: str | None
    figures: str | None
    clustered: bool
    as_json: bool
    view: View


def compare(
    sources: Mapping[str, Source | Spectra], wanted: Wanted, heading: dict[str, Any], compute: dict[str, Any]
) -> None:
    """Compare every two, print, store and draw; exit status 1 if a pair of matrices could not be compared."""
    from spectra.results.all_pairs import compare_all
    from spectra.results.pairs import Pairs
    from spectra.results.partners import links_of

    pairs, notes, reused = Pairs(labels=list(sources)), list[str](), list[str]()
    links = len(links_of([source.names for source in sources.values()]))
    otherwise = "nothing is stored: with --out DIR the same command goes on"
    total = links * len(wanted.sides)
    with report.progress(total, "spectra similarity", kept=wanted.out or "", otherwise=otherwise) as bar:
        kept: dict[str, Any] = {"out": wanted.out, "notes": notes, "reused": reused}
        for pair in compare_all(sources, top=wanted.top, sides=wanted.sides, **kept, **compute):
            pairs.add(pair)
            bar.update()
    report.reused(len(reused), links, wanted.out, notes)
    document = _document(heading, pairs, clustered=wanted.clustered)
    if wanted.out and len(pairs):  # before anything is printed, which may end with the pipe that reads it
        _keep(wanted, pairs, document)
    if wanted.as_json:
        report.print_json(document)
    elif len(pairs):
        if wanted.view.every or wanted.view.chosen:
            _print_rows(pairs, wanted.view)
        else:
            _print(pairs, wanted.clustered)
    _close(pairs)


def _document(heading: dict[str, Any], pairs: Pairs, *, clustered: bool) -> dict[str, Any]:
    from spectra._version import __version__

    order = {"order": [pairs.labels[place] for place in pairs.order()]} if clustered else {}
    return {
        "spectra": __version__,
        "kind": "similarity",
        "updates": list(pairs.labels),
        **heading,
        **order,
        "matrices": _squares(pairs),
        "pairs": pairs.rows(),
        "pooled": pairs.pooled("role"),
        "pooled_by_layer": pairs.pooled("layer"),
        "overall": pairs.pooled("all"),
        "not_compared": [
            {"a": pair.a, "b": pair.b, "name": pair.outcome.name, "status": pair.status, "reason": pair.reason}
            for pair in sorted(pairs.not_compared, key=lambda pair: _STATUSES.index(pair.status))
        ],
    }


def _squares(pairs: Pairs) -> list[dict[str, Any]]:
    """Each matrix with φ(k, k) of every two updates as an N×N square, null where one has none."""
    from spectra import naming

    rows = pairs.pooled("matrix")
    place = {label: i for i, label in enumerate(pairs.labels)}
    squares: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        name, side = row["name"], row["side"]
        if (name, side) not in squares:
            empty = [[None] * len(place) for _ in place]
            squares[name, side] = {
                "name": name,
                "role": naming.role_of(name),
                "layer": naming.layer_of(name),
                "side": side,
                "phi": [[1.0 if i == j else None for j in range(len(place))] for i in range(len(place))],
                "chance": [line.copy() for line in empty],
            }
        i, j = place[row["a"]], place[row["b"]]
        for key in ("phi", "chance"):
            squares[name, side][key][i][j] = squares[name, side][key][j][i] = row[key]
    return list(squares.values())


def _print_rows(pairs: Pairs, view: View) -> None:
    """A line for every pair and role, or with --all for every pair and matrix."""
    layout = Layout(
        shown={"k_used": "k", "phi": "φ(k,k)", "chance": "chance"},
        first={"a": "a", "b": "b", "name": "matrix", "side": "side"},
        group={"a": "a", "b": "b", "role": "role", "side": "side", "matrices": "matrices"},
        pool=lambda rows, columns: pairs.pooled("role"),
        pooled={"k_used", "phi", "chance"},
    )
    if print_rows(pairs.rows(), layout, view):
        report.note("means over the matrices of a role; --all lists every matrix, and so do --out and --json")


def _print(pairs: Pairs, clustered: bool) -> None:
    """φ over everything as a square, or each update's nearest where there are many; then the roles."""
    import numpy as np

    order = pairs.order() if clustered else list(range(len(pairs.labels)))
    for side in pairs.sides:
        square, chance = pairs.square(side), pairs.square(side, value="chance")
        np.fill_diagonal(square, np.nan)
        low, high = np.nanmin(chance), np.nanmax(chance)
        level = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
        say(f"φ(k,k), {side}, mean over matrices; chance {level}")
        if len(order) <= _MOST_SQUARE:
            header = ["", "update", *(str(i + 1) for i in range(len(order)))]
            rows = [[str(i + 1), pairs.labels[a], *(_cell(square[a, b]) for b in order)] for i, a in enumerate(order)]
        else:
            header = ["", "update", "nearest", "φ", "mean φ"]
            rows = [
                [str(i + 1), pairs.labels[a], *_nearest(square[a], pairs.labels), _cell(np.nanmean(square[a]))]
                for i, a in enumerate(order)
                if not np.isnan(square[a]).all()
            ]
        report.print_table(header, rows)
        say()
        report.print_table(["role", "side", "pairs", "k", "mean φ", "least", "most", "chance"], _roles(pairs, side))


def _nearest(line: Any, labels: tuple[str, ...]) -> list[str]:
    import numpy as np

    place = int(np.nanargmax(line))
    return [labels[place], _cell(line[place])]


def _cell(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _roles(pairs: Pairs, side: str) -> list[list[Any]]:
    """Per role: φ over the pairs, its mean and ends."""
    roles: dict[str, list[dict[str, Any]]] = {}
    for row in pairs.pooled("role"):
        if row["side"] == side:
            roles.setdefault(row["role"], []).append(row)
    lines = []
    for role, rows in roles.items():
        phi = [row["phi"] for row in rows]
        k = sorted({row["k_used"] for row in rows})
        chance = sum(row["chance"] for row in rows) / len(rows)
        wide = str(k[0]) if len(k) == 1 else f"{k[0]}–{k[-1]}"
        lines.append([role, side, len(rows), wide, sum(phi) / len(phi), min(phi), max(phi), chance])
    return lines


def _keep(wanted: Wanted, pairs: Pairs, document: dict[str, Any]) -> None:
    """The tables of all pairs and the figures, beside what is stored of each."""
    from spectra.results.tables import to_csv
    from spectra.results.writing import write

    out = Path(wanted.out or ".")
    write(out / "pairs.csv", to_csv(document["pairs"]).encode())
    write(out / "pooled.csv", to_csv(document["pooled"]).encode())
    report.note(f"results: {out}/pairs.csv, {out}/pooled.csv, {out}/pairs/")
    if wanted.figures:
        from spectra.plots.several import draw_pairs

        report.figures(draw_pairs(out, pairs, sides=wanted.sides, clustered=wanted.clustered, size=wanted.figures))


def _close(pairs: Pairs) -> None:
    failed, alone = pairs.failed, pairs.one_sided
    report.by_reason(
        "note", {f"{row['a']}, {row['b']}: {row['name']}": row["note"] for row in pairs.rows() if row["note"]}
    )
    if alone:
        one = alone[0]
        report.note(
            f"{len(alone)} matrices of pairs are in one update only, such as {one.outcome.name} of {one.a} and "
            f"{one.b}: {one.reason}"
        )
    for label, names in pairs.unchanged.items():
        report.note(f"unchanged in {label}, and in none of its pairs: {report.few(names)}")
    listed = {f"{pair.a}, {pair.b}: {pair.outcome.name}": pair.reason for pair in failed}
    report.by_reason("not compared", listed)
    if failed:
        report.warning(f"{len(failed)} of {len(pairs) + len(failed)} pairs of matrices could not be compared")
    elif not len(pairs):
        report.warning("nothing is left to compare")
    if failed or not len(pairs):
        sys.exit(1)
