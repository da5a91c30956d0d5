"""What the numbers of a run say, in plain sentences: each with its numbers, and with its threshold if it has one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from spectra import text
from spectra.deltas.relatedness import UNRELATED, is_unrelated
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.results.tables import Row
from spectra.spectrum import DONE

HALF = 0.5  # of the energy, in the top 8 directions
_EQUAL = 1 + 1e-6  # times a number: what is not above it is the same but for rounding
_MANY = 9.995  # from which on a percentage has more than three digits
_FEW = 0.01  # of a matrix' entries: fewer that are equal in both files are not worth a sentence


def findings(rows: Sequence[Row], base_norms: Mapping[str, float] | None = None) -> list[str]:
    """Sentences about one run.

    Args:
        rows: of its table, as `results.tables.row` gives them.
        base_norms: name → ‖W₀‖_F, of the matrices whose base was read.

    Example:
        >>> from spectra.results.tables import row
        >>> from spectra.spectrum import Spectrum
        >>> findings([row(Spectrum("layers.0.v_proj.weight", (2, 2), S=[3.0, 1.0]))])[0]
        '1 matrix: 1 changed.'
    """
    changed = [row for row in rows if row["status"] == "ok" and row["norm"] > 0]
    told = [_counts(rows), _size(rows, base_norms or {})]
    if changed:
        told += [_where(changed), _extremes(changed), _spread(changed), _dominance(changed), _form(changed)]
    told += [_rounding(changed), _untouched(changed), _unrelated(rows), _truncated(changed)]
    return [sentence for sentence in told if sentence]


def _counts(rows: Sequence[Row]) -> str:
    done = [row for row in rows if row["status"] in DONE]
    changed = sum(row["status"] == "ok" for row in done)
    same, undone = len(done) - changed, len(rows) - len(done)
    parts = [f"{changed:,} changed"]
    parts += [f"{same:,} did not (ΔW = 0)"] if same else []
    parts += [f"{undone:,} could not be done and {'has' if undone == 1 else 'have'} no numbers"] if undone else []
    return f"{text.matrices(len(rows))}: {', '.join(parts)}."


def _size(rows: Sequence[Row], base_norms: Mapping[str, float]) -> str:
    done = [row for row in rows if row["status"] in DONE]
    if not done:
        return ""
    whole = f"All together, ‖ΔW‖_F = √Σ‖ΔW‖² is {_number(_root(row['norm'] for row in done))}"
    known = [row for row in done if base_norms.get(row["name"])]
    if not known:
        return f"{whole}; the base was not read, so it is not known how large that is beside the weights."
    share = _root(row["norm"] for row in known) / _root(base_norms[row["name"]] for row in known)
    of = "" if len(known) == len(done) else f", over the {text.matrices(len(known))} whose base was read"
    return f"{whole}; that is {_percent(share)} of ‖W₀‖_F{of}."


def _where(changed: Sequence[Row]) -> str:
    """The role that holds most of the update."""
    energy: dict[str, float] = {}
    entries: dict[str, int] = {}
    for row in changed:
        energy[row["role"]] = energy.get(row["role"], 0.0) + row["norm"] ** 2
        entries[row["role"]] = entries.get(row["role"], 0) + (row["out"] or 0) * (row["in"] or 0)
    if len(energy) < 2:
        return ""
    most = max(energy, key=lambda role: energy[role])
    share, room = energy[most] / sum(energy.values()), entries[most] / max(sum(entries.values()), 1)
    return (
        f"{most} holds the largest part of the update: {_percent(share)} of Σ‖ΔW‖², with {_percent(room)} of the "
        "entries of the changed matrices."
    )


def _extremes(changed: Sequence[Row]) -> str:
    measured = [row for row in changed if row["relative_norm"] > 0]
    if len(measured) < 2:
        return ""
    largest = max(measured, key=lambda row: row["relative_norm"])
    smallest = min(measured, key=lambda row: row["relative_norm"])
    return (
        f"Relative to its base, {largest['name']} changed most (‖ΔW‖_F/‖W₀‖_F = {_number(largest['relative_norm'])}) "
        f"and {smallest['name']} least of those that changed ({_number(smallest['relative_norm'])})."
    )


def _spread(changed: Sequence[Row]) -> str:
    ranks = [row["rank_90"] for row in changed if not math.isnan(row["rank_90"])]
    if not ranks:
        return ""
    room = float(np.median([row["max_rank"] for row in changed if not math.isnan(row["rank_90"])]))
    return (
        f"90 % of a matrix's energy Σσ² lies in its top {_number(float(np.median(ranks)))} directions (median; from "
        f"{_number(min(ranks))} to {_number(max(ranks))}), of {_number(room)} that are possible (median)."
    )


def _dominance(changed: Sequence[Row]) -> str:
    shares = [row["top_8_share"] for row in changed if row["max_rank"] > 8 and not math.isnan(row["top_8_share"])]
    if not shares:
        return ""
    over = sum(share > HALF for share in shares)
    return (
        f"The top 8 directions hold more than half of the energy (top_8_share > {HALF}) in {over:,} of "
        f"{text.matrices(len(shares))} with more than 8 possible; the median share is {_median_percent(shares)}."
    )


def _form(changed: Sequence[Row]) -> str:
    low = [row for row in changed if row["out"] and row["max_rank"] < min(row["out"], row["in"])]
    if not low:
        return ""
    most = max(row["max_rank"] for row in low)
    return (
        f"{len(low):,} of {len(changed):,} updates are of low rank by their form, an adapter's: rank ≤ {most:,}, less "
        "than the smaller side of the matrix."
    )


def _rounding(changed: Sequence[Row]) -> str:
    known = [row for row in changed if row["noise_edge"]]
    if not known:
        return ""
    drowned = sum(row["signal_rank"] == 0 for row in known)
    share = _median_percent([row["signal_rank"] / max(row["rank"], 1) for row in known])
    rest = f"in {drowned:,} no value is above it" if drowned else "each has a value above it"
    return (
        f"What storing the weights in their type rounds away is known for {text.matrices(len(known))}: the "
        f"median share of singular values above that edge is {share}, and {rest}."
    )


def _untouched(changed: Sequence[Row]) -> str:
    shares = [row["unmoved_share"] for row in changed if row["unmoved_share"] is not None]
    if not shares or max(shares) < _FEW:
        return ""
    return (
        f"Entries that are equal in both files: {_median_percent(shares)} of a changed matrix (median; at most "
        f"{_percent(max(shares))})."
    )


def _unrelated(rows: Sequence[Row]) -> str:
    strange = [row for row in rows if is_unrelated(row["base_cosine"])]
    if not strange:
        return ""
    first = strange[0]
    return (
        f"{len(strange):,} of {text.matrices(len(rows))} have nothing to do with the base's (cosine of W and W₀ under "
        f"{UNRELATED}), such as {first['name']} ({_number(first['base_cosine'])}): their numbers are of no update."
    )


def _truncated(changed: Sequence[Row]) -> str:
    partial = sum(math.isnan(row["effective_rank"]) for row in changed)
    if not partial:
        return ""
    return (
        f"{text.matrices(partial)} {'holds' if partial == 1 else 'hold'} only the top of the spectrum: what needs all "
        "singular values is empty there."
    )


def compared_findings(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Sentences about two runs or more, over the matrices that all of them have and that changed in all.

    Args:
        rows: run's label → its rows.
    """
    changed = {label: {row["name"]: row for row in lines if row["status"] == "ok"} for label, lines in rows.items()}
    if len(changed) < 2:
        return []
    shared = [name for name in next(iter(changed.values())) if all(name in lines for lines in changed.values())]
    if not shared:
        return ["No matrix changed in all of these runs: their numbers stand beside each other, but nothing is shared."]
    runs = "both" if len(changed) == 2 else f"all {len(changed)}"
    told = [f"{text.matrices(len(shared))} changed in {runs} runs; the next sentences are about these."]
    for metric, words in (
        ("norm", "‖ΔW‖_F"),
        ("stable_rank", "the stable rank"),
        ("effective_rank", "the effective rank"),
    ):
        told.append(_ordered(changed, shared, metric, words))
    return [sentence for sentence in told if sentence]


def _ordered(changed: Mapping[str, Mapping[str, Row]], shared: Sequence[str], metric: str, words: str) -> str:
    usable = [name for name in shared if all(not math.isnan(lines[name][metric]) for lines in changed.values())]
    if not usable:
        return ""
    medians = {label: float(np.median([lines[name][metric] for name in usable])) for label, lines in changed.items()}
    most, *others = sorted(medians, key=lambda label: -medians[label])
    listed = ", ".join(f"{label} {_number(medians[label])}" for label in (most, *others))
    numbers = [[lines[name][metric] for lines in changed.values()] for name in usable]
    if all(max(beside) <= _EQUAL * min(beside) for beside in numbers):
        return f"Median of {words}: {listed}; the runs have the same in each of {text.matrices(len(usable))}."
    rivals = {name: max(changed[label][name][metric] for label in others) for name in usable}
    above = sum(changed[most][name][metric] > _EQUAL * rivals[name] for name in usable)
    return f"Median of {words}: {listed}; {most} has the largest in {above:,} of {text.matrices(len(usable))}."


def similarity_findings(similarities: Iterable[SubspaceSimilarity]) -> list[str]:
    """Sentences about a stored comparison, a side each."""
    by_side: dict[str, list[SubspaceSimilarity]] = {}
    for item in similarities:
        by_side.setdefault(item.side, []).append(item)
    return [_similar(side, items) for side, items in by_side.items()]


def _similar(side: str, items: Sequence[SubspaceSimilarity]) -> str:
    chance = fmean(float(item.chance[-1, -1]) for item in items)
    most, least = max(items, key=lambda item: item.phi), min(items, key=lambda item: item.phi)
    ks = text.number_range([item.k_used for item in items])
    told = f"φ(k, k) of the {side} directions, k = {ks}: {_number(fmean(item.phi for item in items))} on average over "
    told += f"{text.matrices(len(items))}, where random directions would give {_number(chance)}"
    if len(items) == 1:
        return f"{told}."
    return f"{told}; most in {most.name} ({_number(most.phi)}), least in {least.name} ({_number(least.phi)})."


def _root(norms: Iterable[float]) -> float:
    return math.sqrt(math.fsum(norm**2 for norm in norms))


def _number(value: float) -> str:
    return text.figure(value)


def _median_percent(shares: Sequence[float]) -> str:
    return _percent(float(np.median(shares)))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < _MANY else f"{100 * share:,.0f} %"
