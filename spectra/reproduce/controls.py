"""What the page's claims are held against, from the stored numbers alone: the start's share, weights, the tail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.metrics.dominance import gini
from spectra.reproduce.analysis import ATTENTION
from spectra.spectrum import Spectrum
from spectra.training import RLoRAConfig

if TYPE_CHECKING:
    import pandas as pd

_ORIGIN = "-origin"


def controls(pictures: Path) -> pd.DataFrame:
    """A row per role and run at the last step, for key and value.

    Columns: `start_share`, the median over the layers of ‖start‖²/‖ΔW‖²; MultiLoRA's start is its origin, R-LoRA's the
    product B̄⁰·A⁰, whose norm is (√out/γ)·√(r/N) on average. `gini_all` counts all min(m, n) values, whatever the rank.
    Against full fine-tuning, on the left: `phi_1`, φ(1, 1); `captured`, the share of the energy in full fine-tuning's
    first k directions, Σᵢσᵢ²‖P uᵢ‖²/Σσ², from the mean grid and the mean shares of energy, since no vectors are
    stored; `phi_below`, φ of the directions k/3 + 1 … k of both. `…_chance` beside them.

    Args:
        pictures: the folder of figures and numbers.
    """
    import pandas as pd

    values = pd.read_csv(pictures / "values.csv.gz")
    runs = pd.read_csv(pictures / "spectra.csv").drop_duplicates("run").set_index("run")
    rows = []
    for role in ATTENTION:
        grids = _grids(pictures / f"figure-4-{role}" / "similarity_grid.csv")
        of_role = values[values["role"] == role]
        for run in [name for name in of_role["run"].unique() if not name.endswith(_ORIGIN)]:
            label = runs.loc[run, "label"] + (f", seed {runs.loc[run, 'seed']}" if runs.loc[run, "seed"] else "")
            own = of_role[of_role["run"] == run]
            grid = grids.pop(label, None)  # a panel is of the first run of its label; other learning rates have none
            rows.append({"role": role, "run": run, "label": label, "lr": runs.loc[run, "lr"],
                         "start_share": _start_share(of_role, run),
                         "gini_all": own.groupby("name").apply(_gini_of_all).median(),
                         **_against_full(own, grid)})  # fmt: skip
    return pd.DataFrame(rows)


def _grids(path: Path) -> dict[str, np.ndarray]:
    """Label → ‖U_iᵀV_j‖_F² of the first i directions of a run and the first j of full fine-tuning."""
    import pandas as pd

    grids = {}
    for panel, group in pd.read_csv(path).groupby("panel"):
        phi = group.pivot(index="i", columns="j", values="phi").to_numpy()
        counts = np.arange(1, len(phi) + 1)
        grids[str(panel).rpartition(":")[0]] = phi * np.minimum.outer(counts, counts)
    return grids


def _start_share(values: pd.DataFrame, run: str) -> float:
    energies = values.assign(energy=values["sigma"] ** 2).groupby(["run", "name"])["energy"].sum()
    if run + _ORIGIN in energies:
        return float((energies[run + _ORIGIN] / energies[run]).median())
    if not run.startswith("rlora"):
        return math.nan
    own = values[values["run"] == run].iloc[0]
    heads = int(str(own["label"]).partition("N=")[2].split()[0])
    norm = math.sqrt(own["out"]) / RLoRAConfig.gamma * math.sqrt(own["max_rank"] / 2 / heads)
    return float((norm**2 / energies[run]).median())


def _gini_of_all(group: pd.DataFrame) -> float:
    shape = (int(group["out"].iloc[0]), int(group["in"].iloc[0]))
    sigma = np.sort(group["sigma"])[::-1]
    return gini(Spectrum("", shape, S=np.pad(sigma, (0, min(shape) - len(sigma)))))


def _against_full(own: pd.DataFrame, grid: np.ndarray | None) -> dict[str, Any]:
    names = ("phi_1", "phi_1_chance", "captured", "captured_chance", "phi_below", "phi_below_chance")
    if grid is None:
        return dict.fromkeys(names, math.nan)
    k, out = len(grid), int(own["out"].iloc[0])
    energies = [
        np.sort(group["sigma"])[::-1][:k] ** 2 / (group["sigma"] ** 2).sum() for _, group in own.groupby("name")
    ]
    shares = np.mean([np.pad(energy, (0, k - len(energy))) for energy in energies], axis=0)
    within = np.diff(grid[:, -1], prepend=0.0)  # ‖P uᵢ‖² of each direction
    above = k // 3
    below = (grid[-1, -1] - grid[above - 1, -1] - grid[-1, above - 1] + grid[above - 1, above - 1]) / (k - above)
    numbers = (grid[0, 0], 1 / out, float(shares @ within), k / out, below, (k - above) / out)
    return dict(zip(names, map(float, numbers), strict=True))
