"""The numbers as Markdown, for the page that people read: `docs/long-training.md` quotes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from spectra.reproduce.long.numbers import Numbers
from spectra.reproduce.long.plan import FULL_ADAM, LORA, MULTILORA, SECOND, LongPlan
from spectra.reproduce.long.rule import Verdict, judge, overall
from spectra.reproduce.page import markdown

if TYPE_CHECKING:
    import pandas as pd

# Column of summary.csv → how the page calls it and writes it.
_COLUMNS = {
    "loss": ("loss", "{:.3f}"),
    "relative_norm": ("‖ΔW‖/‖W₀‖", "{:.1%}"),
    "top_1_share": ("top-1", "{:.2f}"),
    "rank_90": ("rank_90", "{:.1f}"),
    "effective_rank": ("effective rank", "{:.1f}"),
    "start_share": ("start's share", "{:.3f}"),
    "learned_top_1_share": ("top-1 of ΔW − start", "{:.2f}"),
    "learned_rank_90": ("rank_90 of ΔW − start", "{:.1f}"),
    "drift_A": ("drift of A", "{:.2f}"),
    "drift_B": ("drift of B", "{:.2f}"),
}
# The same of directions.csv.
_OF_DIRECTIONS = {
    "intruders": ("intruders of 10", "{:.2f}"),
    "amplification": ("amplification", "{:.2f}"),
    "amplification_own": ("W₀'s own", "{:.2f}"),
    "amplification_random": ("random", "{:.1f}"),
    "left_in_top": ("energy in W₀'s top 10, left", "{:.2f}"),
    "right_in_top": ("right", "{:.2f}"),
    "phi_to_last": ("φ(10, 10) to the last", "{:.2f}"),
    "phi_to_previous": ("to the one before", "{:.2f}"),
    "head_cosine": ("cosine of heads", "{:.2f}"),
    "head_update_cosine": ("of their updates", "{:.2f}"),
}
_OF_PAIRS = {
    "cosine": ("cosine", "{:.2f}"),
    "tail_cosine": ("cosine below the first 12", "{:.2f}"),
    "captured_left": ("energy captured, left", "{:.2f}"),
    "captured_right": ("energy captured, right", "{:.2f}"),
    "phi_left": ("φ(12, 12) left", "{:.2f}"),
    "phi_right": ("φ(12, 12) right", "{:.2f}"),
    "phi_1_left": ("φ(1, 1) left", "{:.2f}"),
    "phi_1_right": ("φ(1, 1) right", "{:.2f}"),
}


def verdicts(summary: pd.DataFrame, plan: LongPlan) -> list[Verdict]:
    """The rule, applied to MultiLoRA's two repetitions and its run at the high rate, at their last snapshots."""
    judged = []
    for run in (MULTILORA, MULTILORA + SECOND, "multilora-fast"):
        reached = {name: set(summary.loc[summary["run"] == name, "step"]) for name in (run, LORA)}
        common = [step for step in plan.snapshots[1:] if all(step in steps for steps in reached.values())]
        judged.append(judge(summary, run, common[-1] if common else plan.first))
    return judged


def tables(numbers: Numbers, plan: LongPlan) -> str:
    """Every table of the page."""
    summary = numbers.summary
    judged = verdicts(summary, plan)
    last = all(verdict.step == plan.steps for verdict in judged)
    parts = [
        "### What the rule says" + ("" if last else ", so far"),
        f"**{overall(judged, plan.steps)}**" + ("" if last else f" (only step {plan.steps:,} counts)"),
        "\n".join(f"* {verdict}" for verdict in judged),
        "### Every run at its last snapshot",
        _rows(summary.groupby("run", sort=False).tail(1), _COLUMNS, steps=True),
        "### MultiLoRA and LoRA along training",
        _rows(summary[summary["run"].isin([LORA, MULTILORA]) & (summary["step"] > 0)], _COLUMNS, steps=True),
    ]
    target = equal_loss(summary)
    if target is not None:
        parts += [f"### At equal held-out loss, {target:.3f}", _rows(at_loss(summary, target), _COLUMNS, steps=True)]
    if len(numbers.pairs):
        parts += ["### Agreement", _agreement(numbers)]
    parts += ["### Directions", _directions(numbers)]
    return "\n\n".join(parts) + "\n"


def equal_loss(summary: pd.DataFrame) -> float | None:
    """The lowest held-out loss that LoRA, MultiLoRA and full fine-tuning have all come to, or None."""
    lowest = summary[summary["step"] > 0].groupby("run")["loss"].min()
    names = (LORA, MULTILORA, FULL_ADAM)
    return float(lowest[list(names)].max()) if all(name in lowest for name in names) else None


def at_loss(summary: pd.DataFrame, target: float) -> pd.DataFrame:
    """Each run where its loss first comes down to the target, between snapshots linearly in log(step).

    Runs that do not come to it are left out.
    """
    import pandas as pd

    rows = []
    for _, group in summary[summary["step"] > 0].groupby("run", sort=False):
        ordered = group.sort_values("step").reset_index(drop=True)
        below = np.flatnonzero(ordered["loss"] <= target)
        if not len(below):
            continue
        after = ordered.loc[below[0]]
        if below[0] == 0:
            rows.append(after)
            continue
        before = ordered.loc[below[0] - 1]
        part = (before["loss"] - target) / (before["loss"] - after["loss"])
        mixed = after.copy()
        for column in _COLUMNS:
            mixed[column] = before[column] + part * (after[column] - before[column])
        mixed["step"] = round(math.exp((1 - part) * math.log(before["step"]) + part * math.log(after["step"])))
        rows.append(mixed)
    return pd.DataFrame(rows)


def _agreement(numbers: Numbers) -> str:
    labels = numbers.summary.drop_duplicates("run").set_index("run")["label"]
    last = numbers.pairs.groupby(["run", "compared_to"], sort=False).tail(1)
    rows = [
        [labels[line["run"]], labels[line["compared_to"]], str(int(line["step"])),
         *(_cell(line[column], form) for column, (_, form) in _OF_PAIRS.items())]
        for _, line in last.iterrows()
    ]  # fmt: skip
    chance = [f"{last[f'chance_{side}'].mean():.2f}" for side in ("left", "right")]
    header = ["run", "compared to", "step", *(title for title, _ in _OF_PAIRS.values())]
    rows.append(["chance", "", "", "0", "0", *chance, *chance, "0.00", "0.00"])
    return markdown(header, rows)


def _directions(numbers: Numbers) -> str:
    labels = numbers.summary.drop_duplicates("run").set_index("run")["label"]
    table = numbers.directions.assign(label=numbers.directions["run"].map(labels))
    rows = [
        [line["label"], str(int(line["step"])), *(_cell(line[key], form) for key, (_, form) in _OF_DIRECTIONS.items())]
        for _, line in table.iterrows()
    ]
    means = table.mean(numeric_only=True)
    chance = {"intruders": "intruders_chance", "left_in_top": "left_chance", "right_in_top": "right_chance",
              "phi_to_last": "phi_to_last_chance", "phi_to_previous": "phi_to_previous_chance"}  # fmt: skip
    levels = [f"{means[chance[name]]:.2f}" if name in chance else "" for name in _OF_DIRECTIONS]
    if "head_chance" in means:
        levels[-2:] = [f"0 ± {means['head_chance']:.2f}", "0"]
    return markdown(["run", "step", *(title for title, _ in _OF_DIRECTIONS.values())], [*rows, ["chance", "", *levels]])


def _rows(table: pd.DataFrame, columns: dict[str, tuple[str, str]], *, steps: bool) -> str:
    rows = [
        [line["label"], *([f"{int(line['step'])}"] if steps else []),
         *(_cell(line[column], form) for column, (_, form) in columns.items())]
        for _, line in table.iterrows()
    ]  # fmt: skip
    return markdown(["run", *(["step"] if steps else []), *(title for title, _ in columns.values())], rows)


def _cell(value: float, form: str) -> str:
    return "–" if math.isnan(value) else form.format(value)
