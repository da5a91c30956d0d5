"""Which rank for which matrix, and the error that results: pure planning over spectra.

The best approximation of rank r is the truncated SVD (Eckart & Young 1936). What it leaves out is the tail of the
spectrum, so the error is known before anything is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from spectra.errors import SelectionError, refuse_path_for_spectra
from spectra.extraction.budget import best_ranks, in_turn
from spectra.metrics.rank import rank_at
from spectra.spectrum import DONE, Spectrum

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Rule:
    """How ranks are chosen: exactly one of the four.

    Attributes:
        rank: the same rank for every matrix.
        energy: for each matrix the least rank that keeps this share of Σσ², above 0 and at most 1.
        parameters: the ranks that lose least in total while all factors together have at most so many entries.
        above_noise: for each matrix the number of values above the edge of storage rounding.

    Raises:
        SelectionError: none of them, several, or a number that is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    parameters: int | None = None
    above_noise: bool = False

    def __post_init__(self) -> None:
        given = [self.rank is not None, self.energy is not None, self.parameters is not None, self.above_noise]
        if sum(given) != 1:
            raise SelectionError(
                f"{sum(given) or 'none'} of rank, energy, parameters and above_noise given: choose the ranks by one"
            )
        if self.rank is not None and self.rank < 1:
            raise SelectionError(f"rank = {self.rank} is not a positive number")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise SelectionError(f"energy = {self.energy} is not a share of Σσ² above 0 and at most 1, such as 0.9")
        if self.parameters is not None and self.parameters < 1:
            raise SelectionError(f"parameters = {self.parameters} is not a positive number")


@dataclass(frozen=True)
class Choice:
    """The rank of one matrix and what follows from it: a row of the table.

    Attributes:
        name: the weight's name.
        rank: how many triplets are kept; 0 leaves the matrix out.
        relative_error: √(Σ_{i>r} σ² / Σσ²) = ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F.
        parameters: entries of the two factors, r·(out + in).
        clamped: why the rank is less than was asked for, or "".
        norm: ‖ΔW‖_F, in which the error is relative.
    """

    name: str
    rank: int
    relative_error: float
    parameters: int
    clamped: str = ""
    norm: float = 0.0


def choose(rule: Rule, spectra: Sequence[Spectrum], *, stored: bool = False) -> list[Choice]:
    """The rank of every matrix that has numbers, in order.

    Args:
        rule: what was asked for.
        spectra: all values of each matrix, or as many as the rule needs.
        stored: whether only triplets count whose vectors the spectra have.

    Raises:
        SelectionError: a budget of parameters is too small for a single rank.
        TruncatedSpectrumError: the values that are there do not reach the energy.

    Example:
        >>> spectra = [Spectrum("a", (2, 2), S=[4.0, 3.0]), Spectrum("b", (2, 2), S=[2.0, 1.0])]
        >>> [(choice.name, choice.rank, choice.relative_error) for choice in choose(Rule(parameters=8), spectra)]
        [('a', 2, 0.0), ('b', 0, 1.0)]
    """
    done = [spectrum for spectrum in spectra if spectrum.status in DONE]
    most = [min(spectrum.rank, spectrum.k) if stored else spectrum.rank for spectrum in done]
    if rule.parameters is not None:
        wanted = _within_budget(done, rule.parameters, most)
    else:
        wanted = [_wanted(rule, spectrum) for spectrum in done]
    return [_choice(rule, *each) for each in zip(done, wanted, most, strict=True)]


def _choice(rule: Rule, spectrum: Spectrum, wanted: int, most: int) -> Choice:
    """The row of a matrix that should have so many triplets, of which it may have fewer."""
    rank = min(wanted, most)
    error, parameters = relative_error(spectrum, rank), rank * sum(spectrum.shape)
    why = _why_less(rule, spectrum, wanted, rank)
    return Choice(spectrum.name, rank, error, parameters, why, spectrum.norm or 0.0)


def relative_error(spectrum: Spectrum, rank: int) -> float:
    r"""√(Σ_{i>r} σ² / Σσ²); 0 for ΔW = 0.

    From the tail where all values are there, and else from ‖ΔW‖_F, with which only errors above 1e-8 can be told
    from none.

    Example:
        >>> relative_error(Spectrum("a", (2, 2), S=[4.0, 3.0]), 1)
        0.6

    Reference: Eckart & Young 1936.
    """
    norm = spectrum.norm or 0.0
    if norm == 0 or rank == 0:
        return float(norm > 0)
    if spectrum.complete:
        return float(np.linalg.norm(spectrum.S[rank:] / norm))
    return math.sqrt(max(0.0, 1.0 - float(np.square(spectrum.S[:rank] / norm).sum())))


def _wanted(rule: Rule, spectrum: Spectrum) -> int:
    if spectrum.status == "unchanged":
        return 0
    if rule.rank is not None:
        return rule.rank
    return int(rank_at(spectrum, rule.energy)) if rule.energy is not None else spectrum.signal_rank


def _why_less(rule: Rule, spectrum: Spectrum, wanted: int, rank: int) -> str:
    if spectrum.status == "unchanged":
        return "unchanged: ΔW = 0"
    if wanted > rank and rank < spectrum.rank:
        return f"rank {wanted} is wanted, and {rank} vectors are stored"
    if wanted > rank:
        return f"rank {wanted} is more than ΔW has: {rank}"
    if rank:
        return ""
    return "no value is above the storage rounding" if rule.above_noise else "the budget goes to other matrices"


def total_error(choices: Iterable[Choice]) -> float:
    """√(Σ‖ΔW − ΔW_r‖² / Σ‖ΔW‖²) over all matrices; 0 where nothing changed.

    Example:
        >>> round(total_error([Choice("a", 1, 0.6, 4, norm=4.0), Choice("b", 0, 1.0, 0, norm=3.0)]), 4)
        0.7684
    """
    rows = list(choices)
    norm = math.hypot(*(row.norm for row in rows))
    return math.hypot(*(row.relative_error * row.norm for row in rows)) / norm if norm else 0.0


def _within_budget(spectra: Sequence[Spectrum], budget: int, most: Sequence[int]) -> list[int]:
    """Ranks that lose least, the largest rank of each matrix given.

    Raises:
        SelectionError: not even one triplet fits.
    """
    costs = [sum(spectrum.shape) for spectrum in spectra]
    gains = [np.square(spectrum.S[:count]) for spectrum, count in zip(spectra, most, strict=True)]
    changed = [(cost, spectrum.name) for cost, spectrum, gain in zip(costs, spectra, gains, strict=True) if len(gain)]
    if changed and min(changed)[0] > budget:
        cost, name = min(changed)
        raise SelectionError(
            f"a budget of {budget:,} parameters is too small for one rank: {name} takes {cost:,} a rank, the fewest"
        )
    return best_ranks(gains, costs, budget)


@dataclass(frozen=True)
class KeptEnergy:
    """How much of Σ‖ΔW‖² factors keep, over how many parameters they have together.

    Attributes:
        parameters: entries of all factors, ascending.
        kept: Σσ² of the triplets that are kept, divided by Σ‖ΔW‖².
    """

    parameters: np.ndarray
    kept: np.ndarray


def kept_by_budget(spectra: Iterable[Spectrum]) -> KeptEnergy:
    """With the ranks of `rank_plan(…, parameters=N)`, for every N that ends with a whole triplet.

    Example:
        >>> curve = kept_by_budget([Spectrum("a", (2, 2), S=[2.0, 1.0]), Spectrum("b", (2, 2), S=[2.0, 0.0])])
        >>> curve.parameters.tolist(), [round(share, 12) for share in curve.kept.tolist()]
        ([4, 8, 12], [0.444444444444, 0.888888888889, 1.0])
    """
    changed = _changed(spectra)
    total = sum((spectrum.norm or 0.0) ** 2 for spectrum in changed)
    _, spent, kept = in_turn([np.square(s.resolved) for s in changed], [sum(s.shape) for s in changed])
    return KeptEnergy(spent, kept / total)


def kept_by_uniform_rank(spectra: Iterable[Spectrum]) -> KeptEnergy:
    """With one rank for all matrices, 1, 2, 3, …; a matrix of a lower rank keeps all that it has.

    Example:
        >>> curve = kept_by_uniform_rank([Spectrum("a", (2, 2), S=[2.0, 1.0]), Spectrum("b", (2, 2), S=[2.0, 0.0])])
        >>> curve.parameters.tolist(), [round(share, 12) for share in curve.kept.tolist()]
        ([8, 12], [0.888888888889, 1.0])
    """
    changed = _changed(spectra)
    total = sum((spectrum.norm or 0.0) ** 2 for spectrum in changed)
    most = max((spectrum.rank for spectrum in changed), default=0)
    spent, kept = np.zeros(most, dtype=np.int64), np.zeros(most)
    for spectrum in changed:
        spent[: spectrum.rank] += sum(spectrum.shape)
        kept[: spectrum.rank] += np.square(spectrum.resolved)
    return KeptEnergy(np.cumsum(spent), np.cumsum(kept) / total)


def _changed(spectra: Iterable[Spectrum]) -> list[Spectrum]:
    """The updates that are not zero.

    Raises:
        SelectionError: there is none.
    """
    changed = [spectrum for spectrum in spectra if spectrum.status in DONE and spectrum.rank]
    if not changed:
        raise SelectionError("no matrix changed: there is no energy to keep")
    return changed


def rank_plan(
    spectra: Iterable[Spectrum],
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    above_noise: bool = False,
) -> pd.DataFrame:
    """The rank that each matrix would need, with the error that results; nothing is written.

    Give one of the four, as for `extract`.

    Args:
        spectra: what `decompose` gives or `load` reads.
        rank: one rank for all.
        energy: the share of Σσ² that each matrix keeps at least.
        parameters: how many entries all factors together may have; the sum of squared errors is what is minimised.
        above_noise: keep the values above storage rounding.

    Returns:
        Columns name, rank, relative_error, parameters, clamped and norm; a row per matrix that has numbers.

    Raises:
        SelectionError: none of the four, several, or a budget that is too small for a single rank.
        TruncatedSpectrumError: the values that are there do not reach the energy.

    Example:
        >>> spectra = [Spectrum("a", (3, 2), S=[4.0, 3.0]), Spectrum("b", (2, 2), S=[5.0, 0.0])]
        >>> print(rank_plan(spectra, energy=0.6)[["name", "rank", "relative_error"]].to_string(index=False))
        name  rank  relative_error
           a     1             0.6
           b     1             0.0
    """
    import pandas as pd

    refuse_path_for_spectra(spectra, "rank_plan")
    choices = choose(Rule(rank, energy, parameters, above_noise), list(spectra))
    return pd.DataFrame([asdict(choice) for choice in choices], columns=[item.name for item in fields(Choice)])
