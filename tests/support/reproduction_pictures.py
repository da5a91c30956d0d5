"""The reproduction's pictures from its stored numbers, in today's look, without its hours of training.

cd tests
python -m support.reproduction_pictures     # writes into figures/reproduction
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import spectra
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.naming import layer_of
from spectra.plots import draw_results, save_figure
from spectra.reproduce.analysis import ALL, ATTENTION, Look
from spectra.reproduce.figures import _label, draw_costs
from spectra.reproduce.plan import REFERENCE, YARDSTICK, Plan
from spectra.spectrum import Spectrum

STORED = Path(__file__).resolve().parents[2] / "figures" / "reproduction"


def draw(target: Path, scratch: Path) -> None:
    """Figures 1, 3, 4 and 5 into folders of the target, as `spectra reproduce` draws them."""
    plan = Plan()
    called = {run.name: _label(Look(run, plan.steps, ALL)) for run in plan.main_runs()}
    _store_spectra(scratch)
    methods = [name for name in called if name != YARDSTICK]
    histograms = {f"figure-5-{role}": (role, methods) for role in ATTENTION}
    for folder, (role, runs) in {"figure-1": ("v_proj", [REFERENCE, "lora"]), **histograms}.items():
        draw_results([scratch / run for run in runs], target / folder, layers=role, title=f"ΔW of {role}",
                     labels=[called[run] for run in runs], kinds=["histogram"])  # fmt: skip
    for role in ATTENTION:
        _draw_similarity(target / f"figure-4-{role}", called, plan)
    draw_costs(pd.read_csv(STORED / "figure-3" / "cost.csv").to_dict("records"), target / "figure-3")


def _store_spectra(scratch: Path) -> None:
    """The singular values of every run as a directory of results."""
    values = pd.read_csv(STORED / "values.csv.gz")
    for run, matrices in values.groupby("run"):
        spectra.save(
            [
                Spectrum(str(name), (int(rows["out"].iloc[0]), int(rows["in"].iloc[0])), S=rows["sigma"].to_numpy(),
                         max_rank=int(rows["max_rank"].iloc[0]))
                for name, rows in matrices.groupby("name", sort=False)
            ],
            scratch / str(run),
        )  # fmt: skip


def _draw_similarity(target: Path, called: dict[str, str], plan: Plan) -> None:
    """The heatmaps of a role, from their cells."""
    cells = pd.read_csv(STORED / target.name / "similarity_grid.csv")
    folders = {label: f"{run}-step-{plan.steps}" for run, label in called.items()}
    panels = {panel: _panel(str(panel), rows) for panel, rows in cells.groupby("panel", sort=False)}
    sides = {panel: (folders[panel.split(":")[0]], folders[called[REFERENCE]]) for panel in panels}
    target.mkdir(parents=True, exist_ok=True)
    figure = spectra.similarity_figure(panels, title="similarity to full fine-tuning", labels=sides)
    save_figure(figure, target / "similarity")


def _panel(name: str, cells: pd.DataFrame) -> SubspaceSimilarity:
    """What was pooled over a matrix in each layer."""
    grid, chance = (cells.pivot(index="i", columns="j", values=value).to_numpy() for value in ("phi", "chance"))
    k, layers = len(grid), pd.read_csv(STORED / "values.csv.gz", usecols=["name"])["name"].map(layer_of).nunique()
    return SubspaceSimilarity(name, cells["side"].iloc[0], k, grid, chance, np.zeros(k), f"mean over {layers} matrices")


def main() -> None:
    """Draw them anew where they lie; the tables beside them, whose numbers were less rounded, stay."""
    with tempfile.TemporaryDirectory() as place:
        drawn = Path(place, "figures")
        draw(drawn, Path(place))
        for path in sorted(drawn.glob("*/*.p*")):
            shutil.copy(path, STORED / path.parent.name)


if __name__ == "__main__":
    main()
