"""The numbers as Markdown tables, for a page that people read: `docs/reproduction.md` quotes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.reproduce.analysis import ATTENTION
from spectra.reproduce.controls import controls
from spectra.reproduce.plan import REFERENCE, SECOND_SEED

if TYPE_CHECKING:
    import pandas as pd

# Column of spectra.csv → how the page calls it and writes it.
_SPECTRUM = {
    "relative_norm": ("‖ΔW‖/‖W₀‖", "{:.2%}"),
    "top_1_share": ("top-1 share", "{:.1%}"),
    "top_8_share": ("top-8 share", "{:.1%}"),
    "stable_rank": ("stable rank", "{:.1f}"),
    "effective_rank": ("effective rank", "{:.1f}"),
    "effective_share": ("effective / possible rank", "{:.2f}"),
    "gini": ("Gini of possible values", "{:.2f}"),
    "gini_all": ("Gini of all values", "{:.2f}"),
}
# The same of what `controls` gives.
_CONTROLS = {
    "start_share": ("‖start‖²/‖ΔW‖²", "{:.2f}"),
    "gini_all": ("Gini of all values", "{:.2f}"),
    "phi_1": ("φ(1, 1) left", "{:.3f}"),
    "captured": ("energy in full's first 30, left", "{:.3f}"),
    "phi_below": ("φ of directions 11 to 30, left", "{:.3f}"),
}
# Title, file and columns of what runs have since the first weights were let go; without the file there is no table.
_FURTHER: tuple[tuple[str, str, dict[str, tuple[str, str]]], ...] = (
    ("Against the base", "alignment", {
        "intruders": ("intruders of 10", "{:.2f}"),
        "intruders_chance": ("by chance", "{:.2f}"),
        "amplification": ("amplification", "{:.2f}"),
        "amplification_own": ("W₀'s own", "{:.2f}"),
        "amplification_random": ("random", "{:.1f}"),
        "left_in_top": ("energy in W₀'s top 10, left", "{:.2f}"),
        "left_chance": ("by chance", "{:.2f}"),
        "right_in_top": ("right", "{:.2f}"),
        "right_chance": ("by chance", "{:.2f}"),
    }),
    ("Heads and parallel modules", "heads", {
        "heads": ("heads", "{:.0f}"),
        "cosine": ("cosine of B", "{:.2f}"),
        "chance": ("chance ±", "{:.2f}"),
        "update_cosine": ("of B·A", "{:.2f}"),
        "norm": ("‖B‖", "{:.2f}"),
    }),
    ("From step to step", "series", {
        "phi_to_last": ("φ(10, 10) to the last", "{:.2f}"),
        "phi_to_last_chance": ("by chance", "{:.2f}"),
        "start_left": ("energy in the first step's, left", "{:.2f}"),
        "start_left_chance": ("by chance", "{:.2f}"),
        "start_right": ("right", "{:.2f}"),
        "start_right_chance": ("by chance", "{:.2f}"),
    }),
)  # fmt: skip


def tables(pictures: Path) -> str:
    """Every table of the page, from the csv files that `reproduce` wrote.

    Args:
        pictures: the folder of figures and numbers.
    """
    import pandas as pd

    spectra, similarity, tasks = (pd.read_csv(pictures / f"{name}.csv") for name in ("spectra", "similarity", "tasks"))
    costs = pd.read_csv(pictures / "figure-3" / "cost.csv")
    last, early = int(spectra["step"].max()), int(spectra["step"].min())
    parts = []
    for role in ATTENTION:
        parts += [f"### {role}, step {last}", _spectra(spectra, similarity, role, last)]
    parts += [f"### Controls, step {last}", _controls(pictures)]
    parts += [f"### Held-out loss (accuracy), step {last}", _families(tasks, last)]
    if early < last:
        for role in ATTENTION:
            parts += [
                f"### Other learning rates and seeds: {role}, step {early}",
                _spectra(spectra, similarity, role, early),
            ]
        parts += [f"### Held-out loss (accuracy), step {early}", _families(tasks, early)]
    for title, name, columns in _FURTHER:
        if (pictures / f"{name}.csv").is_file():
            parts += [f"### {title}", _further(pd.read_csv(pictures / f"{name}.csv"), columns)]
    parts += ["### Cost of training", _costs(costs)]
    return "\n\n".join(parts) + "\n"


def _spectra(spectra: pd.DataFrame, similarity: pd.DataFrame, role: str, step: int) -> str:
    of_role = spectra[spectra["role"] == role]
    # With zeros appended to r values, so that they are s, a Gini coefficient g becomes 1 − (r/s)(1 − g).
    share = of_role["max_rank"] / of_role["max_rank"].max()  # full fine-tuning's is min(out, in)
    of_role = of_role.assign(gini_all=1 - share * (1 - of_role["gini"]))
    chosen = of_role[of_role["step"] == step]
    alike = similarity[
        (similarity["role"] == role) & (similarity["step"] == step) & (similarity["compared_to"] == REFERENCE)
    ].set_index(["run", "side"])
    rows = []
    for _, line in chosen.iterrows():
        phis = [
            f"{alike.loc[key, 'phi']:.3f}" if (key := (line["run"], side)) in alike.index else "–"
            for side in ("left", "right")
        ]
        values = [form.format(line[name]) for name, (_, form) in _SPECTRUM.items()]
        rows.append([_name(line["label"], line["run"]), f"{line['lr']:.2g}", *values, *phis])
    chance = alike.groupby("side")["chance"].mean() if len(alike) else {"left": float("nan"), "right": float("nan")}
    header = ["run", "learning rate", *(title for title, _ in _SPECTRUM.values()),
              f"φ left (chance {chance['left']:.3f})", f"φ right (chance {chance['right']:.3f})"]  # fmt: skip
    return markdown(header, rows)


def _controls(pictures: Path) -> str:
    rows = []
    table = controls(pictures)
    for _, line in table.iterrows():
        cells = [_cell(line[column], form) for column, (_, form) in _CONTROLS.items()]
        rows.append([f"{line['role']}, {line['label']}", f"{line['lr']:.2g}", *cells])
    chance = table[[f"{name}_chance" for name in ("phi_1", "captured", "phi_below")]].mean()
    rows.append(["chance", "", "–", "–", *(f"{value:.3f}" for value in chance)])
    return markdown(["run", "learning rate", *(title for title, _ in _CONTROLS.values())], rows)


def _cell(value: float, form: str) -> str:
    return "–" if math.isnan(value) else form.format(value)


def _families(tasks: pd.DataFrame, step: int) -> str:
    chosen = tasks[tasks["step"].isin([0, step])]
    means = chosen.groupby(["run", "family"], sort=False)[["loss", "accuracy"]].mean()
    families = list(dict.fromkeys(chosen["family"]))
    rows = []
    for run in dict.fromkeys(chosen["run"]):
        cells = [means.loc[(run, family)] for family in families]
        whole = chosen[chosen["run"] == run][["loss", "accuracy"]].mean()
        rows.append([run, *(f"{cell['loss']:.2f} ({cell['accuracy']:.0%})" for cell in [*cells, whole])])
    return markdown(["run", *families, "all"], rows)


def _further(table: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> str:
    """A row per run, step and role."""
    table = table.sort_values("role", kind="stable")
    rows = [
        [f"{line['role']}, {line['label']}", str(int(line["step"])),
         *(_cell(line[name], form) for name, (_, form) in columns.items())]
        for _, line in table.iterrows()
    ]  # fmt: skip
    return markdown(["run", "step", *(title for title, _ in columns.values())], rows)


def _costs(costs: pd.DataFrame) -> str:
    rows = [
        [line["label"], f"{line['parameters']:,}", f"{line['tokens_per_second']:.0f}", f"{line['peak_mib']:,.0f}"]
        for _, line in costs.iterrows()
    ]
    return markdown(["method", "trained parameters", "tokens/s", "peak MiB"], rows)


def _name(label: str, run: str) -> str:
    return f"{label}, second seed" if run.endswith(SECOND_SEED) else label


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])
