"""How the nouns show themselves: one line of text, and in a notebook a plain table.

Only what a noun already holds is shown: no tensor is read and no array is printed. Names and reasons
come from files, so everything is escaped. There are no colours, so a dark theme stays dark.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from spectra import naming

if TYPE_CHECKING:
    from spectra.metrics.similarity import SubspaceSimilarity
    from spectra.types import Coverage, Source, Spectrum, WeightDelta

Row = Sequence[object]

_LONGEST = 400  # characters of a cell; a name in a file can be as long as its author likes
_ROWS = 24  # of a table that groups
_ROLES = 8  # on one line
_STORED = 12  # files that are opened for the list of a results directory
_LINES = 5  # warnings and notes
_VALUES = 5  # singular values


def size(shape: Sequence[int]) -> str:
    """A shape as people write it.

    >>> size((384, 1536)), size(())
    ('384×1536', '?')
    """
    return "×".join(map(str, shape)) or "?"


def matrices(count: int) -> str:
    """A number of matrices in words.

    >>> matrices(1), matrices(1200)
    ('1 matrix', '1,200 matrices')
    """
    return f"{count:,} {'matrix' if count == 1 else 'matrices'}"


def contents(names: Sequence[str]) -> str:
    """How many matrices there are, and how many of each role, the most frequent first.

    >>> contents(["layers.0.q_proj.weight", "layers.0.v_proj.weight", "layers.1.q_proj.weight"])
    '3 matrices: 2 q_proj, 1 v_proj'
    """
    counts = Counter(map(naming.role_of, names))
    listed = [f"{count} {role}" for role, count in counts.most_common(_ROLES)]
    told = ", ".join(listed + ["…"] * (len(counts) > _ROLES))
    return f"{matrices(len(names))}{': ' if told else ''}{told}"


def left_out(coverage: Coverage) -> str:
    """What was not used, as counts; "" for nothing.

    >>> from spectra.types import Coverage
    >>> left_out(Coverage(skipped={"a.bias": "a vector", "b.bias": "a vector"}))
    '2 skipped'
    """
    return ", ".join(f"{count:,} {key}" for key, count in coverage.counts.items() if count)


def rank_of(spectrum: Spectrum) -> str:
    """The rank beside the largest that is possible; a lower bound where only the top is there.

    >>> from spectra.types import Spectrum
    >>> rank_of(Spectrum("a", (3, 4), S=[2.0, 1.0, 0.0])), rank_of(Spectrum("a", (3, 4), S=[2.0, 1.0]))
    ('2 of 3', 'at least 2 of 3')
    """
    return f"{'' if spectrum.complete else 'at least '}{spectrum.rank} of {spectrum.max_rank}"


def corner(similarity: SubspaceSimilarity) -> str:
    """φ(k, k) and its chance level.

    >>> import numpy as np
    >>> from spectra.metrics.similarity import SubspaceSimilarity
    >>> one = np.ones((1, 1))
    >>> corner(SubspaceSimilarity("a", "left", 1, one, one / 4, np.zeros(1)))
    'φ(1, 1) = 1.000, chance 0.250'
    """
    k = similarity.k_used
    if not similarity.grid.size:
        return "nothing compared"
    return f"φ({k}, {k}) = {similarity.phi:.3f}, chance {similarity.chance[-1, -1]:.3f}"


def html_of_source(source: Source) -> str:
    """Where it was read from, a table by role, and what was left out."""
    facts = {"tuned": source.tuned, "base": source.base or "none", "not used": left_out(source.coverage) or "nothing"}
    lines = [f"warning: {text}" for text in source.coverage.warnings]
    notes = [f"note: {text}" for text in dict.fromkeys(delta.note for delta in source.deltas) if text]
    columns = ("role", "matrices", "shape", "rank ≤", "status")
    table = _by_role(source.deltas)
    return _page(
        f"Source: {source.kind}, {matrices(len(source))}", facts, columns, table, _first(lines) + _first(notes)
    )


def html_of_coverage(coverage: Coverage) -> str:
    """Every list by reason, with counts and an example; `print` names every entry."""
    found: dict[tuple[str, str], list[Any]] = {}
    for key in coverage.counts:
        listed: Mapping[str, str] = getattr(coverage, key)
        for name, reason in listed.items():
            found.setdefault((key, reason), [0, name])[0] += 1
    rows = [(key, reason, count, example) for (key, reason), (count, example) in found.items()]
    warnings = [f"warning: {text}" for text in coverage.warnings]
    heading = f"Coverage: {left_out(coverage) or 'everything was paired and used'}"
    return _page(heading, {}, ("list", "reason", "entries", "for example"), rows, _first(warnings))


def html_of_delta(delta: WeightDelta) -> str:
    """Name, size and form of one update, and which stored tensors it is made of."""
    facts = {
        "role": delta.role,
        "layer": "–" if delta.layer is None else delta.layer,
        "shape": size(delta.shape),
        "rank ≤": delta.max_rank if delta.recipe else "–",
        "form": made_of(delta),
        "status": _status(delta.status, delta.reason),
        "note": delta.note,
    }
    refs = delta.recipe.refs if delta.recipe else ()
    rows = [(ref.name, ref.dtype, size(ref.shape), "/".join(PurePath(ref.path).parts[-2:])) for ref in refs]
    return _page(f"WeightDelta: {delta.name}", facts, ("stored tensor", "dtype", "shape", "file"), rows)


def html_of_spectrum(spectrum: Spectrum) -> str:
    """Status, norm, rank and the first singular values of one update."""
    facts: dict[str, object] = {
        "shape": size(spectrum.shape),
        "status": _status(spectrum.status, spectrum.reason),
    }
    if spectrum.norm is not None:
        share = f" = {spectrum.norm / spectrum.base_norm:.3g} ‖W₀‖_F" if spectrum.base_norm else ""
        facts |= {"‖ΔW‖_F": f"{spectrum.norm:.4g}{share}", "rank": rank_of(spectrum)}
    if spectrum.noise_edge:
        facts["above the rounding edge"] = f"{spectrum.signal_rank} values over {spectrum.noise_edge:.3g}"
    if len(spectrum.S):
        more = ["…"] * (len(spectrum.S) > _VALUES)
        facts["σ"] = ", ".join([f"{value:.4g}" for value in spectrum.S[:_VALUES]] + more)
    if spectrum.k:
        facts["vectors"] = f"the top {spectrum.k}"
    return _page(f"Spectrum: {spectrum.name}", facts | {"method": spectrum.method, "note": spectrum.note})


def html_of_similarity(similarity: SubspaceSimilarity) -> str:
    """Side, number of directions, φ at both corners and the chance level there."""
    axis = {"left": "left singular vectors (out)", "right": "right singular vectors (in)"}
    facts: dict[str, object] = {
        "side": axis[similarity.side],
        "directions": f"k = {similarity.k_used}",
        "gap behind them": "" if math.isnan(similarity.gap) else f"{similarity.gap:.2g} σ_k",
    }
    rows = []
    if similarity.grid.size:
        corners = {1: (0, 0), similarity.k_used: (-1, -1)}
        rows = [
            (f"φ({k}, {k})", f"{similarity.grid[at]:.3f}", f"{similarity.chance[at]:.3f}") for k, at in corners.items()
        ]
    return _page(
        f"SubspaceSimilarity: {similarity.title}",
        facts | {"note": similarity.note},
        ("", "value", "chance"),
        rows,
    )


def html_of_stored(directory: object, names: Sequence[str], records: Iterable[Mapping[str, Any] | None]) -> str:
    """A results directory and its first matrices, from their headers.

    Args:
        directory: where the results lie.
        names: all matrices.
        records: their headers, read as far as they are shown; None for a damaged one.
    """
    rows = [_stored_row(name, record) for name, record in zip(names[:_STORED], records, strict=False)]
    if len(names) > _STORED:
        rows.append((f"… and {len(names) - _STORED:,} more; spectra.summarize(…) shows all", *[""] * 6))
    columns = ("name", "status", "shape", "‖ΔW‖_F", "rank ≤", "values", "vectors")
    return _page(f"StoredSpectra: {matrices(len(names))} in {directory}", {}, columns, rows)


def made_of(delta: WeightDelta) -> str:
    """The form that `read` gives, and the recipe's name; "not readable" without one.

    >>> import torch
    >>> from spectra.types import WeightDelta
    >>> made_of(WeightDelta.from_tensor("a.weight", torch.eye(2)))
    'dense, InMemory'
    """
    if delta.recipe is None:
        return "not readable"
    return f"{'factored' if delta.factored else 'dense'}, {type(delta.recipe).__name__}"


def _by_role(deltas: Iterable[WeightDelta]) -> list[Row]:
    """One row per role, shape and status; the ranks of one row as a range."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for delta in deltas:
        ranks.setdefault((delta.role, size(delta.shape), delta.status), []).append(delta.max_rank)
    return [
        (role, len(found), shape, _range(found) if status == "ok" else "–", status)
        for (role, shape, status), found in ranks.items()
    ]


def _stored_row(name: str, record: Mapping[str, Any] | None) -> Row:
    if record is None:
        return (name, "missing or damaged", *["–"] * 5)
    norm = record.get("norm")
    return (
        name,
        record.get("status", "?"),
        size(record.get("shape") or ()),
        "–" if norm is None else f"{norm:.4g}",
        record.get("max_rank", "–"),
        record.get("values", "–"),
        record.get("k", "–"),
    )


def _range(numbers: Sequence[int]) -> int | str:
    low, high = min(numbers), max(numbers)
    return low if low == high else f"{low} – {high}"


def _status(status: str, reason: str) -> str:
    return f"{status}: {reason}" if reason else status


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _LINES
    return [*lines[:_LINES], *([f"… and {more:,} more"] if more > 0 else [])]


def _page(
    heading: str,
    facts: Mapping[str, object],
    columns: Sequence[str] = (),
    rows: Sequence[Row] = (),
    lines: Sequence[str] = (),
) -> str:
    """Heading, label → text, a table, and lines below it; what is empty is left out."""
    blocks = [f"<p><b>{_text(heading)}</b></p>"]
    told = [f"<tr>{_cell(label, 'th')}{_cell(value)}</tr>" for label, value in facts.items() if value != ""]
    blocks += [_table("", told)] if told else []
    if rows:
        head = "".join(_cell(column, "th", like=value) for column, value in zip(columns, rows[0], strict=True))
        shown = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:_ROWS]]
        if len(rows) > _ROWS:
            shown.append(f'<tr><td colspan="{len(columns)}">… and {len(rows) - _ROWS:,} more rows</td></tr>')
        blocks.append(_table(f"<tr>{head}</tr>", shown))
    blocks += [f"<p>{_text(line)}</p>" for line in lines]
    return f"<div>{''.join(blocks)}</div>"


def _table(head: str, rows: Sequence[str]) -> str:
    return f"<table>{f'<thead>{head}</thead>' if head else ''}<tbody>{''.join(rows)}</tbody></table>"


def _cell(value: object, tag: str = "td", *, like: object = None) -> str:
    """One cell, numbers at the right; a heading stands where the value below it does."""
    side = "right" if isinstance(value if like is None else like, int) else "left"
    return f'<{tag} style="text-align: {side}">{_text(value)}</{tag}>'


def _text(value: object) -> str:
    text = str(value)
    return html.escape(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
