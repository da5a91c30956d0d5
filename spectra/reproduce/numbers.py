"""The numbers behind the figures and the verdict, as tables that can be read without the models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.reproduce.analysis import (
    ATTENTION,
    Look,
    alignment_of,
    heads_of,
    looks,
    pairs,
    series_of,
    similarity_of,
    spectra_of,
)
from spectra.reproduce.plan import Plan, Run
from spectra.reproduce.tasks import FAMILY_OF

if TYPE_CHECKING:
    import pandas as pd

# Of every matrix; a role's row holds their medians over the layers.
_OF_A_MATRIX = (
    "relative_norm", "sigma_1", "top_1_share", "top_8_share", "stable_rank", "effective_rank", "rank_90", "gini",
)  # fmt: skip
_AGAINST_BASE = (
    "intruders", "intruders_chance", "amplification", "amplification_own", "amplification_random",
    "left_in_top", "left_chance", "right_in_top", "right_chance", "principal_top", "principal_random",
)  # fmt: skip


def spectra_table(directory: Path, plan: Plan) -> pd.DataFrame:
    """Run × step × role: medians over the layers, and effective rank as a share of the rank there could be."""
    import pandas as pd

    import spectra

    rows: list[dict[str, Any]] = []
    for look in looks(plan):
        table = spectra.summarize(spectra.load(spectra_of(directory, look), vectors=False))
        table = table.rename(columns={"gini_max_rank": "gini"})
        table["effective_share"] = table["effective_rank"] / table["max_rank"]
        for role, group in table[table["status"] == "ok"].groupby("role", sort=False):
            medians = group[[*_OF_A_MATRIX, "effective_share"]].median()
            rows.append({**_identity(look), "role": role, "matrices": len(group),
                         "max_rank": int(group["max_rank"].max()), **medians})  # fmt: skip
    return pd.DataFrame(rows)


def values_table(directory: Path, plan: Plan) -> pd.DataFrame:
    """Run × matrix × index: every singular value of key and value at the end, enough to draw the histograms."""
    import pandas as pd

    import spectra

    tables = []
    for look in looks(plan):
        if look.step < plan.steps:
            continue
        for spectrum in spectra.load(spectra_of(directory, look), vectors=False).select(list(ATTENTION)):
            out, inside = spectrum.shape
            tables.append(pd.DataFrame({**_identity(look), "name": spectrum.name, "role": spectrum.role, "out": out,
                                        "in": inside, "max_rank": spectrum.max_rank, "sigma": spectrum.S}))  # fmt: skip
    return pd.concat(tables)[["run", "label", "name", "role", "out", "in", "max_rank", "sigma"]]


def similarity_table(directory: Path, plan: Plan) -> pd.DataFrame:
    """Run × step × role × side: φ(k, k) to another run, its mean and range over the layers, beside chance."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for look, partner in pairs(plan):
        table = pd.read_csv(similarity_of(directory, look, partner) / "similarity.csv")
        for (role, side), group in table.groupby(["role", "side"], sort=False):
            rows.append({**_identity(look), "compared_to": partner.run.name, "role": role, "side": side,
                         "k": int(group["k_used"].min()), "phi": group["phi"].mean(), "phi_min": group["phi"].min(),
                         "phi_max": group["phi"].max(), "chance": group["chance"].mean()})  # fmt: skip
    return pd.DataFrame(rows)


def alignment_table(directory: Path, plan: Plan) -> pd.DataFrame:
    """Run × role at the end: means over the layers of columns of `spectra.alignment`."""
    return _by_role(plan, "alignment", {run: alignment_of(directory, run) for run in plan.main_runs()}, _AGAINST_BASE)


def heads_table(directory: Path, plan: Plan) -> pd.DataFrame:
    """Run × role at the end, of those with heads or parallel modules: means over the layers of how alike they are."""
    runs = {run: heads_of(directory, run) for run in plan.main_runs() if run.method.n > 1}
    return _by_role(plan, "heads", runs, ("heads", "cosine", "update_cosine", "chance", "norm"))


def series_table(directory: Path, plan: Plan) -> pd.DataFrame:
    """Run × step × role: means over the layers of φ to the last step, and of the energy left in the first step's."""
    runs = {run: series_of(directory, run) for run in plan.main_runs()}
    columns = ("phi_to_last", "phi_to_last_chance", "start_left", "start_left_chance", "start_right",
               "start_right_chance")  # fmt: skip
    return _by_role(plan, "series", runs, columns, by=["step", "role"])


def _by_role(
    plan: Plan, name: str, folders: Mapping[Run, Path], columns: Sequence[str], by: Sequence[str] = ("role",)
) -> pd.DataFrame:
    """The means of every run's table that a command left in its folder."""
    import pandas as pd

    parts = []
    for run, folder in folders.items():
        table = pd.read_csv(folder / f"{name}.csv")
        means = table[table["status"] == "ok"].groupby(list(by), sort=False)[list(columns)].mean().reset_index()
        if "step" not in by:
            means.insert(0, "step", plan.steps)
        means.insert(0, "label", run.method.label + (f", seed {run.seed}" if run.seed else ""))
        means.insert(0, "run", run.name)
        parts.append(means)
    return pd.concat(parts, ignore_index=True)


def task_table(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Run × step × task: held-out loss and accuracy."""
    import pandas as pd

    return pd.DataFrame([
        {"run": result["name"], "step": int(step), "family": FAMILY_OF[task], "task": task, **score}
        for result in results
        for step, tasks in result["scores"].items()
        for task, score in tasks.items()
    ])  # fmt: skip


def run_table(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Run: settings, trained parameters, tokens and seconds."""
    import pandas as pd

    columns = ("name", "lr", "seed", "steps", "parameters", "tokens", "seconds")
    return pd.DataFrame([{key: result[key] for key in columns} for result in results if "lr" in result])


def _identity(look: Look) -> dict[str, Any]:
    run = look.run
    origin = ("-origin", ", origin") if look.origin else ("", "")
    return {
        "run": run.name + origin[0],
        "label": run.method.label + origin[1],
        "step": look.step,
        "lr": run.lr,
        "seed": run.seed,
        "total_rank": run.method.total_rank,
    }
