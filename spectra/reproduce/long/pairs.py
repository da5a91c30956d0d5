"""Two runs at the same step: do their updates agree, and does what lies below the first directions?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import spectra
from spectra import Spectrum
from spectra.reproduce.long.measure import open_update
from spectra.reproduce.long.plan import FULL_ADAM, SECOND, LongPlan, LongRun

if TYPE_CHECKING:
    import pandas as pd

TOP = 12  # directions that are compared, the adapters' rank, and the cut above the tail


def run_pairs(plan: LongPlan) -> list[tuple[LongRun, LongRun]]:
    """Every run beside both full runs with Adam, and every repetition beside its first run, the full one included."""
    runs = {run.name: run for run in plan.runs()}
    full = [runs[FULL_ADAM], runs[FULL_ADAM + SECOND]]
    others = [run for run in runs.values() if run not in full]
    repeated = [(run, runs[name.removesuffix(SECOND)]) for name, run in runs.items() if name.endswith(SECOND)]
    return [(run, reference) for reference in full for run in others] + repeated


def compare_runs(a: LongRun, b: LongRun, step: int, plan: LongPlan, directory: Path) -> pd.DataFrame:
    """A row per matrix of how a's update lies to b's.

    Columns: `cosine` of the two matrices, ⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖·‖ΔW_b‖), and `tail_cosine`, the same after the first 12
    directions of each are taken off (NaN where nothing is left: two tails of noise have about 0). On each side
    `captured_…`, the share of a's energy in b's first 12 directions, Σᵢσᵢ²‖P_b uᵢ‖²/Σᵢσᵢ²; `phi_…`, φ(12, 12) without
    weights; `phi_1_…`, φ(1, 1); `chance_…`, 12 over the side's dimension, for the first two.
    """
    import pandas as pd

    sources = [open_update(run, step, plan, directory) for run in (a, b)]
    tops = [spectra.decompose(source, top=TOP).collect() for source in sources]
    dense = [{delta.name: delta.read().to_dense().double().numpy() for delta in source} for source in sources]
    rows = []
    for first in tops[0]:
        pair = (first, tops[1][first.name])
        whole = [matrices[first.name] for matrices in dense]
        rows.append({"run": a.name, "compared_to": b.name, "step": step, "name": first.name, "role": first.role,
                     "cosine": cosine(*whole),
                     "tail_cosine": cosine(*(_tail(*item) for item in zip(whole, pair, strict=True))),
                     **_on_both_sides(*pair, whole[0])})  # fmt: skip
    return pd.DataFrame(rows)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """⟨a, b⟩/(‖a‖·‖b‖); NaN where one of them is zero.

    Example:
        >>> cosine(np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]]))
        0.96
    """
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / lengths if lengths else math.nan


def _tail(whole: np.ndarray, spectrum: Spectrum) -> np.ndarray:
    """What is left without the first directions; exactly zero where the rank allows no more."""
    assert spectrum.U is not None
    assert spectrum.Vh is not None
    if spectrum.rank <= TOP:
        return np.zeros_like(whole)
    return whole - (spectrum.U * spectrum.S[: spectrum.k]) @ spectrum.Vh


def _on_both_sides(a: Spectrum, b: Spectrum, whole: np.ndarray) -> dict[str, float]:
    energy = float((whole**2).sum())
    shares: dict[str, float] = {}
    for side, first, second, matrix in (
        ("left", a.U, b.U, whole),
        ("right", None if a.Vh is None else a.Vh.T, None if b.Vh is None else b.Vh.T, whole.T),
    ):
        assert first is not None
        assert second is not None
        shares[f"captured_{side}"] = float(((second.T @ matrix) ** 2).sum()) / energy
        shares[f"phi_{side}"] = float(((second.T @ first) ** 2).sum()) / min(first.shape[1], second.shape[1])
        shares[f"phi_1_{side}"] = float((second[:, 0] @ first[:, 0]) ** 2)
        shares[f"chance_{side}"] = second.shape[1] / len(second)
    return shares
