"""Spectra × metrics → tables: rows of plain values, and a tidy DataFrame."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np

from spectra import naming
from spectra.errors import SelectionError, TruncatedSpectrumError, refuse_path_for_spectra
from spectra.metrics import METRICS
from spectra.metrics.signal import OfSignal, is_all_signal
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.printing import printed
from spectra.results.similarities import Compared, pool_by_role
from spectra.spectrum import DONE, Spectrum, times_power

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
Metrics = Mapping[str, Callable[[Spectrum], float]]
By = Literal["matrix", "role"]
Whole = Literal["matrix", "role", "model"]
_SIZES = ("norm", "sigma_1", "relative_norm", "signal_norm")  # what grows with ΔW; the other metrics are ratios
SIMILARITY_COLUMNS = (
    *("name", "role", "side", "k_used", "phi", "chance", "phi_1_1", "smallest_angle", "largest_angle", "gap"),
    *("note", "other"),
)
MOVED = ("moved", "moved_1e-6", "moved_1e-5")  # the shares of entries with |ΔW| above `spectra.deltas.forms.MOVED`

# What was made of a spectrum: a run that is stored wants its row for the table on the disk and for the one on stdout.
_MADE: WeakKeyDictionary[Spectrum, tuple[Metrics, Row]] = WeakKeyDictionary()


def row(spectrum: Spectrum, metrics: Metrics = METRICS) -> Row:
    """One matrix as column → value; NaN where a metric has no value or would need values that are not there."""
    before, columns = _MADE.get(spectrum, ({}, {}))
    if not columns or not metrics.items() <= before.items():
        before, columns = metrics, _row(spectrum, _measured(spectrum, metrics))
        _MADE[spectrum] = before, columns
    if len(before) == len(metrics):
        return dict(columns)
    others = before.keys() - metrics.keys()
    return {column: value for column, value in columns.items() if column not in others}


def remember(spectrum: Spectrum, measured: Mapping[str, float]) -> None:
    """Make its row from metrics that are known already."""
    _MADE[spectrum] = METRICS, _row(spectrum, measured)


def without_vectors(spectrum: Spectrum) -> Spectrum:
    """The same with singular values only, and with what was measured of it; `k` still counts the vectors."""
    if spectrum.U is None and spectrum.Vh is None:
        return spectrum
    bare = replace(spectrum, U=None, Vh=None)
    if spectrum in _MADE:
        _MADE[bare] = _MADE[spectrum]
    return bare


def _measured(spectrum: Spectrum, metrics: Metrics) -> Row:
    usual, exponent = _of_usual_size(spectrum)
    columns = _values(metrics, usual)
    if exponent:
        columns |= {name: times_power(columns[name], exponent) for name in _SIZES if name in columns}
    return columns


def _values(metrics: Metrics, spectrum: Spectrum) -> Row:
    """Each metric's value; where all is signal, those of the signal are the plain ones and not measured again."""
    if not is_all_signal(spectrum):
        return {name: _value(metric, spectrum) for name, metric in metrics.items()}
    found: dict[Callable[[Spectrum], float], float] = {}
    columns: Row = {}
    for name, metric in metrics.items():
        plain = metric.plain if isinstance(metric, OfSignal) else metric
        if plain not in found:
            found[plain] = _value(plain, spectrum)
        columns[name] = found[plain]
    return columns


def _row(spectrum: Spectrum, measured: Mapping[str, float]) -> Row:
    out, inside = spectrum.shape if len(spectrum.shape) == 2 else (None, None)
    columns: Row = {
        "name": spectrum.name,
        "role": spectrum.role,
        "layer": spectrum.layer,
        "out": out,
        "in": inside,
        "status": spectrum.status,
        "max_rank": spectrum.max_rank,
        "rank": spectrum.rank if spectrum.status in DONE else None,
        "signal_rank": spectrum.signal_rank if spectrum.status in DONE else None,
        "noise_edge": spectrum.noise_edge,
        "unmoved_share": spectrum.unmoved_share,
        "base_cosine": spectrum.base_cosine,
        "k": spectrum.k,
        **measured,
    }
    moved = dict(zip(MOVED, spectrum.moved or (None,) * len(MOVED), strict=True))
    said = {"method": spectrum.method, "reason": spectrum.reason, "note": spectrum.note, "rounding": spectrum.rounding}
    return columns | said | moved


def _of_usual_size(spectrum: Spectrum) -> tuple[Spectrum, int]:
    """The spectrum as 2^e · another whose squares are in float64's range, and e; itself and 0 where they are already.

    >>> _of_usual_size(Spectrum("a", (1, 1), S=[2.0**600]))[1], _of_usual_size(Spectrum("a", (1, 1), S=[2.0]))[1]
    (601, 0)
    """
    largest = float(spectrum.S[0]) if len(spectrum.S) else 0.0
    if not math.isfinite(largest) or largest == 0 or 1e-70 < largest < 1e70:
        return spectrum, 0
    exponent = math.frexp(largest)[1]
    norm = None if spectrum.norm is None else times_power(spectrum.norm, -exponent)
    edge = None if spectrum.noise_edge is None else times_power(spectrum.noise_edge, -exponent)
    resolution = times_power(spectrum.resolution, -exponent)
    S = np.ldexp(spectrum.S, -exponent)
    return replace(spectrum, S=S, norm=norm, noise_edge=edge, noise_energy=None, resolution=resolution), exponent


def role_rows(rows: Iterable[Row], metrics: Iterable[str] = tuple(METRICS)) -> list[Row]:
    """One row per role: how many matrices are done, how many of them have ΔW = 0, and medians over the others.

    Roles stand in the model's order.

    A median is None where no matrix of the role has a value.

    Example:
        >>> spectra = [Spectrum(f"layers.{i}.v_proj.weight", (2, 2), S=[s, 0.0]) for i, s in enumerate([1.0, 2.0, 6.0])]
        >>> role_rows(map(row, spectra), ["norm"])
        [{'role': 'v_proj', 'matrices': 3, 'unchanged_matrices': 0, 'norm': 2.0}]
    """
    metrics = list(metrics)
    roles: dict[str, list[Row]] = {}
    for line in rows:
        if line["status"] in DONE:
            roles.setdefault(line["role"], []).append(line)
    return [
        {
            "role": role,
            "matrices": len(lines),
            "unchanged_matrices": sum(line["status"] == "unchanged" for line in lines),
            **{name: _median(lines, name) for name in metrics},
        }
        for role, lines in ((role, roles[role]) for role in naming.in_model_order(roles))
    ]


def model_row(rows: Iterable[Row]) -> Row:
    """One row over everything: how much of the model moved, and how the output projection moved beside the query.

    `moved` … are shares of the entries of all matrices whose ΔW is read entry by entry (`moved_entries` of them), and
    `o_over_q` is the mean relative norm of o_proj over that of q_proj; None where nothing is known.

    Example:
        >>> two = [Spectrum("h.0.q_proj.weight", (1, 4), S=[2.0], base_norm=4.0, moved=(0.5, 0.5, 0.0)),
        ...        Spectrum("h.0.o_proj.weight", (1, 12), S=[3.0], base_norm=4.0, moved=(0.0, 0.0, 0.0))]
        >>> model_row(map(row, two))["moved"], model_row(map(row, two))["o_over_q"]
        (0.125, 1.5)
    """
    done = [line for line in rows if line["status"] in DONE]
    sized = [(line["out"] * line["in"], line) for line in done if line["moved"] is not None]
    entries = sum(size for size, _ in sized)
    moved = {key: math.fsum(size * line[key] for size, line in sized) / entries if entries else None for key in MOVED}
    means = {role: _mean([line["relative_norm"] for line in done if line["role"] == role])
             for role in ("o_proj", "q_proj")}  # fmt: skip
    query, output = means["q_proj"], means["o_proj"]
    return {
        "matrices": len(done),
        "unchanged_matrices": sum(line["status"] == "unchanged" for line in done),
        "moved_entries": entries,
        **moved,
        "o_over_q": output / query if query and output is not None else None,
    }


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None


def _median(rows: Iterable[Row], name: str) -> float | None:
    given = [line[name] for line in rows if line["status"] == "ok" and line[name] is not None]
    values = [value for value in given if not math.isnan(value)]
    return float(np.median(values)) if values else None


def _value(metric: Callable[[Spectrum], float], spectrum: Spectrum) -> float:
    if spectrum.status not in DONE:
        return math.nan
    try:
        return metric(spectrum)
    except TruncatedSpectrumError:
        return math.nan


def similarity_row(similarity: SubspaceSimilarity) -> Row:
    """One comparison as column → value."""
    k = similarity.k_used
    return {
        "name": similarity.name,
        "role": similarity.role,
        "side": similarity.side,
        "k_used": k,
        "phi": similarity.phi,
        "chance": float(similarity.chance[-1, -1]),
        "phi_1_1": float(similarity.grid[0, 0]),
        "smallest_angle": float(similarity.angles[0]),
        "largest_angle": float(similarity.angles[-1]),
        "gap": similarity.gap,
        "note": similarity.note,
        "other": similarity.other,
    }


def summarize(spectra: Iterable[Spectrum], *, by: Whole = "matrix") -> pd.DataFrame:
    """A table of names, shapes, statuses, ranks and every metric of METRICS.

    Args:
        spectra: any spectra; a stored `Spectra` has `to_frame`, which leaves the vectors on the disk.
        by: "matrix" for a row each; "role" for a row per role with counts and the medians over its changed matrices;
            "model" for one row: which share of all entries moved, and the ratio of mean relative norms o_proj/q_proj.

    Raises:
        SelectionError: `by` is none of these, or what is given are no spectra.

    Example:
        >>> table = summarize([Spectrum("layers.0.v_proj.weight", (2, 2), S=[4.0, 3.0])])
        >>> print(table[["role", "norm", "max_rank"]].to_string(index=False))
          role  norm  max_rank
        v_proj   5.0         2
    """
    import pandas as pd

    _check_by(by, Whole)
    rows = [row(spectrum) for spectrum in _only_spectra(spectra)]
    return pd.DataFrame(rows if by == "matrix" else role_rows(rows) if by == "role" else [model_row(rows)])


def _only_spectra(given: Iterable[Any]) -> Iterator[Spectrum]:
    """What is given, if it holds spectra; else what to do, since computing them may take hours."""
    refuse_path_for_spectra(given, "summarize")
    for item in given:
        if not isinstance(item, Spectrum):
            raise SelectionError(
                f"summarize takes spectra, and was given {type(item).__name__}: summarize(decompose(source)) makes them"
            )
        yield item


def summarize_similarity(similarities: Iterable[Compared], *, by: By = "matrix") -> pd.DataFrame:
    """A table of φ(k, k), its chance level, φ(1, 1), principal angles and the gap behind the last direction.

    Args:
        similarities: what `compare` gives; what could not be compared is left out.
        by: "matrix" for a row each; "role" for the mean over the matrices of each role and side.

    Raises:
        SelectionError: `by` is neither.
    """
    import pandas as pd

    _check_by(by, By)
    compared = [item for item in similarities if isinstance(item, SubspaceSimilarity)]
    return pd.DataFrame([similarity_row(item) for item in (compared if by == "matrix" else pool_by_role(compared))])


def _check_by(by: str, known: Any) -> None:
    if by not in get_args(known):
        raise SelectionError(f"by={by!r} is not one of {', '.join(get_args(known))}")


_FORMULAS = ("=", "+", "-", "@")


def to_csv(rows: list[Row]) -> str:
    """Rows as CSV text, names as they are printed; empty cells for None and NaN."""
    buffer = io.StringIO()
    if rows:
        columns = list(rows[0])
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(_blanks([line.get(column) for line in rows]) for column in columns), strict=True))
    return buffer.getvalue()


def _blanks(column: list[Any]) -> list[Any]:
    """A column's values as its cells; of thousands of equal texts one is looked through."""
    kinds = set(map(type, column))
    if kinds <= {float}:
        return ["" if value != value else value for value in column]
    if kinds <= {str}:
        cells = {text: _cell(text) for text in set(column)}
        return [cells[text] for text in column]
    return [*map(_blank, column)]


def _blank(value: Any) -> Any:
    if isinstance(value, float):  # most are
        return "" if math.isnan(value) else value
    return "" if value is None else _cell(value) if isinstance(value, str) else value


def _cell(text: str) -> str:
    r"""A text as it is printed; its first sign is escaped where a spreadsheet would take it for the begin of a formula.

    >>> _cell("=1+1"), _cell("layers.0.q_proj.weight")
    ('\\x3d1+1', 'layers.0.q_proj.weight')
    """
    said = printed(text)
    return f"\\x{ord(said[0]):02x}{said[1:]}" if said[:1] in _FORMULAS else said
