"""A run's directions: new ones beside the base's, those that stay until the end, and whether heads drift apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import spectra
from spectra.reproduce.long.measure import PROJECTIONS, open_update
from spectra.reproduce.long.plan import LongPlan, LongRun
from spectra.reproduce.long.train import base_of, snapshot

if TYPE_CHECKING:
    import pandas as pd

K = 10  # of intruder dimensions, of W₀'s top directions and of φ
_AGAINST_BASE = (
    "intruders", "intruders_chance", "amplification", "amplification_own", "amplification_random",
    "left_in_top", "left_chance", "right_in_top", "right_chance",
)  # fmt: skip
_ALONG = ("phi_to_last", "phi_to_last_chance", "phi_to_previous", "phi_to_previous_chance")
_OF_HEADS = {"cosine": "head_cosine", "chance": "head_chance", "update_cosine": "head_update_cosine"}


def against_base(run: LongRun, step: int, plan: LongPlan, directory: Path) -> pd.DataFrame:
    """One row: means over the matrices of columns of `spectra.alignment`, and of `spectra.head_similarity` of heads.

    MultiLoRA's parallel modules count as heads, too; what has none has no value there.
    """
    found = spectra.alignment(open_update(run, step, plan, directory), k=K, cache=directory / "base-vectors")
    means = dict(found.loc[found["status"] == "ok", list(_AGAINST_BASE)].astype(float).mean())
    means |= dict.fromkeys(_OF_HEADS.values(), math.nan)
    if run.method.n > 1:
        folder, base = snapshot(directory, run.name, step), base_of(directory, plan)
        heads = spectra.head_similarity(spectra.open_source(folder, base, heads="each").select(PROJECTIONS))
        of_heads = heads.loc[heads["status"] == "ok", list(_OF_HEADS)].astype(float).mean()
        means |= dict(of_heads.rename(_OF_HEADS))
    return _table([{"run": run.name, "step": step, **means}])


def along(run: LongRun, steps: Sequence[int], plan: LongPlan, directory: Path) -> pd.DataFrame:
    """A row per step: means over the matrices of φ(10, 10) to the run's last snapshot and to the one before."""
    folders = [snapshot(directory, run.name, step) for step in steps]
    found = spectra.series(folders, base_of(directory, plan), layers=PROJECTIONS, steps=steps, top=K)
    found[list(_ALONG)] = found[list(_ALONG)].astype(float)
    means = found.groupby("step")[list(_ALONG)].mean()
    return _table([{"run": run.name, "step": step, **means.loc[step]} for step in steps])


def _table(rows: list[dict[str, object]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows)
