"""`write_report`: runs → one HTML page, under 3 MB, with its style, its script and its numbers inside.

Names of tensors, paths, labels and reasons come from strangers' files. They reach the page as text only: the template
escapes each, the numbers travel as JSON that no tag can end, the script makes text nodes of them, and the page's own
policy lets the browser run nothing but the script whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra import text
from spectra._version import __version__
from spectra.errors import MissingExtraError, SelectionError
from spectra.plots.squares import short_names
from spectra.plots.stored import run_labels
from spectra.printing import strict
from spectra.report import pictures
from spectra.report.cells import LEVELS
from spectra.report.kept import Section
from spectra.report.paths import shorter, without_places
from spectra.report.runs import Run, read_runs, run_of
from spectra.results.collection import Spectra
from spectra.results.findings import compared_findings, findings, similarity_findings
from spectra.results.homes import home_of
from spectra.results.tables import Row, role_rows, similarity_row
from spectra.results.writing import write

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_BYTES = 3_000_000
_MOST_ROWS = (2000, 1000, 400, 100, 20)  # tried in turn until the page is small enough
_CURVE_NUMBERS = 1_000_000 // 22  # points of all curves together, by what one takes in bytes
_POINTS = (12, 48)  # of one curve
_MOST_NAMED = 5  # runs in a title
_LONGEST = 400  # characters of a name
_SHOWN = ("norm", "relative_norm", "stable_rank", "effective_rank", "rank_90", "top_8_share", "signal_rank")
_BY_ROLE = (
    "norm",
    "relative_norm",
    "stable_rank",
    "effective_rank",
    "rank_90",
    "top_8_share",
    "signal_rank",
    "noise_edge",
)
_TEXTS = ("run", "name", "role", "side", "shape", "status", "method", "reason", "note", "rounding")
_HIDDEN = ("out", "in", "k", "method", "reason", "note", "rounding")
_SIMILARITY_HIDDEN = ("note", "smallest_angle", "largest_angle")


def write_report(
    directories: str | Path | Spectra | Sequence[str | Path],
    path: str | Path,
    *,
    labels: Sequence[str] = (),
    layers: str | Sequence[str] = (),
    title: str = "",
) -> None:
    """Write one HTML page about one or several runs, which works from a disk and without a network.

    It holds what was compared, what the numbers say in sentences, the histogram, metrics over layer × role,
    similarities where they are stored, every matrix with its spectrum in a table that sorts and filters, what was not
    used, and warnings; and what else a directory holds: an alignment, a series, an interference, heads, a verified
    merge, every two of several updates.

    Paths are shortened, since a page is made to be sent; run.json has them in full. It is smaller than 3 MB: of
    very many matrices the table has the largest updates, and says so.

    Args:
        directories: results directories, made by `decompose(…, out=…)`, `compare(…, out=…)`, `save` or another
            command's --out; or a `Spectra`.
        path: the file to write, replaced if it is there.
        labels: what each run is called; () for its folder's name.
        layers: only the matrices that these patterns mean; () for all.
        title: of the page; "" for the runs' labels.

    Raises:
        StoreError: a directory holds no results, or the page cannot be written.
        SelectionError: labels do not fit the directories, layers select nothing, or there is too much for one page.
        MissingExtraError: Jinja2 is not installed.
    """
    environment = _environment()
    runs = _runs(directories, labels, layers)
    write(home_of(path), _render(environment, runs, title).encode())


def _runs(
    directories: str | Path | Spectra | Sequence[str | Path], labels: Sequence[str], layers: str | Sequence[str]
) -> list[Run]:
    if isinstance(directories, Spectra):
        if len(labels) > 1:
            raise SelectionError(f"{len(labels)} labels for one run: give one or none")
        chosen = directories.select(layers) if layers else directories
        called = labels[0] if labels else directories.directory.resolve().name if directories.directory else "spectra"
        return [run_of(chosen, called, record=directories.run)]
    places = [directories] if isinstance(directories, str | Path) else list(directories)
    if not places:
        raise SelectionError("there is no results directory to report on: give at least one")
    called_so = run_labels(places, labels)
    called_so = called_so if labels or len(called_so) < 2 else short_names(called_so)
    return [run for place, label in zip(places, called_so, strict=True) for run in read_runs(place, label, layers)]


def _environment() -> Environment:
    """Templates that escape every value, and write out characters that cannot be seen."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise MissingExtraError("a report", "report") from None
    from spectra.report.words import breakable

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else text.visible(str(value))

    environment = Environment(
        loader=PackageLoader("spectra.report", "template"), autoescape=True, undefined=StrictUndefined,
        finalize=finalize, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["figure"] = text.figure
    environment.filters["cut"] = _cut
    environment.filters["breakable"] = lambda value: breakable(_cut(str(value)))
    environment.filters["heading"] = lambda value: breakable(value, long=0)
    environment.filters["placeless"] = without_places
    return environment


def _render(environment: Environment, runs: Sequence[Run], title: str) -> str:
    """The page with as many matrices in its table as fit."""
    static = _static(runs, title)
    for most in _MOST_ROWS:
        page = environment.get_template("page.html").render(**static, **_embedded(environment, runs, most))
        if len(page.encode()) < MOST_BYTES:
            return page
    raise SelectionError(
        f"the page would have {len(page.encode()) / 1e6:.1f} MB with {len(runs)} runs, more than {MOST_BYTES / 1e6:g}: "
        "report on fewer directories, or on fewer matrices (layers=, --layer)"
    )


def _static(runs: Sequence[Run], title: str) -> dict[str, Any]:
    """What does not depend on how many matrices the table has."""
    panels, panels_left_out = pictures.similarity(runs)
    rows = {run.label: run.rows for run in runs if run.rows}
    medians = {run.label: _medians(run.rows) for run in runs}
    return {
        "title": title or _listed(_names(runs)),
        "version": __version__,
        "runs": runs,
        "several": len(runs) > 1,
        "findings": {run.label: _findings(run) for run in runs},
        "sections": [section for run in runs for section in run.sections],
        "compared": compared_findings(rows),
        "histogram": pictures.histogram(runs),
        "depth": pictures.depth(runs),
        "levels": range(LEVELS),
        "panels": panels,
        "panels_left_out": panels_left_out,
        "roles": pictures.roles(runs, medians),
        "role_columns": _BY_ROLE,
        "undone": {run.label: [row for row in run.rows if row["status"] not in ("ok", "unchanged")] for run in runs},
    }  # fmt: skip


def _findings(run: Run) -> list[str]:
    own = findings(run.rows, run.base_norms) if run.rows else []
    others = [sentence for section in run.sections for sentence in section.findings]
    return [without_places(sentence) for sentence in [*own, *similarity_findings(run.similarities), *others]]


def _names(runs: Sequence[Run]) -> list[str]:
    """The runs' labels for a title: a comparison of several once and not for every two, and no more than a few."""
    whole = [run.label for run in runs if run.sections and not run.rows]
    names = [run.label for run in runs if not any(run.label.startswith(f"{label}: ") for label in whole)]
    more = len(names) - _MOST_NAMED
    return [*names[:_MOST_NAMED], f"{more} more"] if more > 1 else names


def _listed(labels: Sequence[str]) -> str:
    """Labels in a sentence.

    >>> _listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def _medians(rows: Sequence[Row]) -> list[Row]:
    """Rows by role; a number that is not known is none of the median's."""
    known = [{**row, **{name: math.nan if row[name] is None else row[name] for name in _BY_ROLE}} for row in rows]
    return role_rows(known, _BY_ROLE)


def _embedded(environment: Environment, runs: Sequence[Run], most: int) -> dict[str, Any]:
    """Style, script and numbers, as they stand in the page, with the policy that names them."""
    from markupsafe import Markup

    style, script = (_source(name) for name in ("page.css", "page.js"))
    matrices, listed = _matrices(runs, most)
    kept = [_section_table(place, section, most) for place, section in enumerate(_sections(runs))]
    tables = [table for table in (matrices, _compared(runs, most), *kept) if table["rows"]]
    grids = [{"grid": panel["grid"]} for panel in pictures.similarity(runs)[0]]
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    return {
        "style": Markup(style),
        "script": Markup(script),
        "policy": Markup(policy),
        "numbers": _readable({"tables": tables, "grids": grids}),
        "tables": [table["id"] for table in tables[: len(tables) - len(kept)]],
        "listed": listed,
        "most": most,
    }


def _source(name: str) -> str:
    return resources.files("spectra.report").joinpath("template", name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _matrices(runs: Sequence[Run], most: int) -> tuple[dict[str, Any], str]:
    """The table of matrices with their curves; and a sentence where it has not all of them."""
    filled = [run for run in runs if run.rows]
    each = max(most // max(len(filled), 1), 1)
    chosen = [(run, place) for run in filled for place in _largest(run.rows, each)]
    points = min(max(_CURVE_NUMBERS // max(len(chosen), 1), _POINTS[0]), _POINTS[1])
    columns = ["name", "role", "layer", "shape", "status", *_SHOWN]
    more = [name for name in (filled[0].rows[0] if filled else ()) if name not in columns and name not in _HIDDEN]
    columns = [*(["run"] if len(runs) > 1 else []), *columns, *more, *_HIDDEN]
    rows, curves = [], []
    for run, place in chosen:
        row = run.rows[place] | {"run": run.label, "shape": text.size(run.spectra[place].shape)}
        rows.append([_cell(row[column], column) for column in columns])
        curves.append(
            {
                "points": pictures.curve(run.spectra[place].resolved, run.spectra[place].norm, points),
                "edge": run.spectra[place].noise_edge,
                "whole": run.spectra[place].complete,
            }
        )
    total = sum(len(run.rows) for run in filled)
    said = (
        f"Of {text.matrices(total)}, {len(chosen):,} are listed, to keep the page small: those without numbers, and "
        "those with the largest ‖ΔW‖_F; summary.csv has all."
    )
    shown = ["run", "name", "role", "layer", "shape", "status", *_SHOWN]
    table = {"id": "matrices", "columns": _columns(columns, shown), "rows": rows, "curves": curves}
    return table, said if len(chosen) < total else ""


def _largest(rows: Sequence[Row], most: int) -> list[int]:
    """The places of the rows to list, in their order: those without a number first in line, then by ‖ΔW‖_F."""
    places = range(len(rows))
    first = sorted(places, key=lambda place: -(math.inf if math.isnan(rows[place]["norm"]) else rows[place]["norm"]))
    return sorted(first[:most])


def _compared(runs: Sequence[Run], most: int) -> dict[str, Any]:
    """The table of stored similarities."""
    rows = [{"run": run.label, **similarity_row(item)} for run in runs for item in run.similarities]
    columns = [name for name in (rows[0] if rows else ()) if name != "run" or len(runs) > 1]
    shown = [name for name in columns if name not in _SIMILARITY_HIDDEN]
    values = [[_cell(row[name], name) for name in columns] for row in rows[:most]]
    return {"id": "similarities", "columns": _columns(columns, shown), "rows": values, "curves": []}


def _sections(runs: Sequence[Run]) -> list[Section]:
    return [section for run in runs for section in run.sections]


def _section_table(place: int, section: Section, most: int) -> dict[str, Any]:
    """The table of another command; longer ones end where the page would grow too large."""
    columns = list(section.rows[0]) if section.rows else []
    rows = [[_cell(row.get(name), name) for name in columns] for row in section.rows[:most]]
    texts = {name for name in columns if any(isinstance(row.get(name), str) for row in section.rows)}
    listed = [{"key": name, "text": name in texts, "shown": name in section.shown} for name in columns]
    return {"id": f"kept-{place}", "columns": listed, "rows": rows, "curves": [], "total": len(section.rows)}


def _cell(value: Any, column: str) -> Any:
    """A value of a table; a name is as it is, other words do not say where files lie."""
    if not isinstance(value, str):
        return value
    return _cut(value if column == "name" else without_places(shorter(value)))


def _columns(columns: Sequence[str], shown: Sequence[str]) -> list[dict[str, Any]]:
    return [{"key": name, "text": name in _TEXTS, "shown": name in shown} for name in columns]


def _cut(value: str) -> str:
    """A name in full, unless it is longer than any model's."""
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}… ({len(value):,} characters)"


def _readable(document: Mapping[str, Any]) -> Any:
    """The document as JSON that stands inside a script element: no character of it can end that, or start a comment."""
    from markupsafe import Markup

    dumped = json.dumps(_visible(strict(document)), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return Markup(dumped)


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return text.visible(value)
    if isinstance(value, dict):
        return {key: _visible(item) for key, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, list) else value
