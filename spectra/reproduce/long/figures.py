"""Curves along training: what the spectra do, what the start has to do with it, and whether runs agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spectra.plots import save_figure
from spectra.plots.style import COLOURS, look, new_axes
from spectra.reproduce.long.numbers import Numbers
from spectra.reproduce.long.plan import FULL_ADAM, SECOND

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Run → colour and line; a repetition has its run's colour, thinner.
_STYLE: dict[str, tuple[str, str]] = {
    "lora": (COLOURS[0], "-"),
    "lora-fast": (COLOURS[0], "--"),
    "multilora": (COLOURS[1], "-"),
    "multilora-fast": (COLOURS[1], "--"),
    "multilora-scaling": (COLOURS[1], ":"),
    "rlora": (COLOURS[2], "-"),
    "full": ("0.25", "-"),
    "full-sgd": ("0.25", "--"),
}
NAMES = {
    "loss": "held-out loss, nats per token",
    "top_1_share": "top-1 share of the energy",
    "rank_90": "directions for 90 % of the energy",
    "learned_rank_90": "the same of ΔW − start",
    "start_share": "‖start‖² / ‖ΔW‖²",
    "drift_A": "‖A − A₀‖ / ‖A₀‖",
    "drift_B": "‖B − B₀‖ / ‖B₀‖",
    "in_start_left": "energy in the start's column space",
    "in_start_right": "energy in the start's row space",
    "captured_left": "energy in full's first 12, left",
    "captured_right": "energy in full's first 12, right",
    "cosine": "cosine with full's ΔW",
    "tail_cosine": "cosine of what is below the first 12",
    "intruders": "intruder dimensions among 10",
    "amplification": "amplification",
    "phi_to_last": "φ(10, 10) to the last snapshot",
    "head_update_cosine": "cosine of the heads' updates",
}
_LOG = {"amplification", "rank_90", "learned_rank_90", "start_share", "drift_A", "drift_B"}
# Quantity → the column with its chance level.
_CHANCE = {
    "captured_left": "chance_left",
    "captured_right": "chance_right",
    "in_start_left": "in_start_left_chance",
    "in_start_right": "in_start_right_chance",
    "phi_to_last": "phi_to_last_chance",
}


def plot_along(table: pd.DataFrame, quantity: str, *, against: str = "step", ax: Axes | None = None) -> Axes:
    """One quantity of every run along training.

    Args:
        table: rows with `run`, `label`, `step` and the quantity; what has no value is left out.
        quantity: a key of NAMES.
        against: "step", or "loss" to compare where runs are equally good.
        ax: where to draw; None for a new figure.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    ax = new_axes(ax)
    there = set(table["run"])
    for run, rows in table.groupby("run", sort=False):
        drawn = rows[quantity] > 0 if quantity in _LOG else rows[quantity].notna()
        known = rows[(rows["step"] > 0) & drawn].sort_values("step")
        if known.empty:
            continue
        first = str(run).removesuffix(SECOND)
        colour, line = _STYLE[first]
        again = run != first
        label = "_again" if again and first in there else known["label"].iloc[0]
        width = 0.9 if again else 1.8
        ax.plot(known[against], known[quantity], color=colour, linestyle=line, linewidth=width, marker="o",
                markersize=2.5, label=label)  # fmt: skip
    if quantity in _LOG:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if against == "step":
        ax.set_xscale("log", base=2)
        steps = sorted(set(table.loc[table["step"] > 0, "step"]))
        ax.set_xticks(steps, [f"{step:,}" for step in steps], fontsize=8)
    else:
        ax.invert_xaxis()
    ax.set_xlabel("steps" if against == "step" else NAMES["loss"])
    ax.set_ylabel(NAMES[quantity])
    return ax


def draw_all(numbers: Numbers, pictures: Path) -> None:
    """Every figure of the page."""
    labels = numbers.summary.drop_duplicates("run").set_index("run")["label"]
    pairs = numbers.pairs.assign(label=numbers.pairs["run"].map(labels))
    pictures.mkdir(parents=True, exist_ok=True)
    along = ("loss", "drift_A", "start_share", "top_1_share", "rank_90", "learned_rank_90")
    _panels(numbers.summary, along, pictures / "along-training", "step")
    of_start = ("drift_A", "drift_B", "in_start_left", "in_start_right")
    _panels(numbers.summary, of_start, pictures / "leaving-the-start", "step")
    _panels(numbers.summary, ("top_1_share", "rank_90"), pictures / "at-equal-loss", "loss")
    to_full = pairs[pairs["compared_to"] == FULL_ADAM]
    if len(to_full):
        of_full = ("captured_left", "captured_right", "cosine", "tail_cosine")
        _panels(to_full, of_full, pictures / "agreement", "step")
    directions = numbers.directions.assign(label=numbers.directions["run"].map(labels))
    of_directions = ("intruders", "amplification", "phi_to_last", "head_update_cosine")
    _panels(directions, of_directions, pictures / "directions", "step")
    _draw_shares(numbers, labels, pictures / "spectra")


def _panels(table: pd.DataFrame, quantities: tuple[str, ...], target: Path, against: str) -> None:
    from matplotlib.figure import Figure

    # Before the runs that a quantity needs have begun there is nothing to draw of it.
    quantities = tuple(name for name in quantities if (table.loc[table["step"] > 0, name] > 0).any())
    columns = 3 if len(quantities) > 4 else 2
    lines = -(-len(quantities) // columns)
    with look():
        figure = Figure(figsize=(4.2 * columns, 3.3 * lines + 0.9), layout="constrained")
        every = figure.subplots(lines, columns, squeeze=False).flatten()
        axes = every[: len(quantities)]
        for ax in every[len(quantities) :]:
            ax.set_axis_off()
        for ax, quantity in zip(axes, quantities, strict=True):
            plot_along(table, quantity, against=against, ax=ax)
            if quantity in _CHANCE:
                level = table[_CHANCE[quantity]].mean()
                ax.axhline(level, color="0.6", linestyle=(0, (1, 2)), linewidth=1.2)
                ax.annotate("chance", (0.01, level), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
        if {"rank_90", "learned_rank_90"} <= set(quantities):
            places = [axes[quantities.index(name)] for name in ("rank_90", "learned_rank_90")]
            limits = [limit for ax in places for limit in ax.get_ylim()]
            for ax in places:
                ax.set_ylim(min(limits), max(limits))
        handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8.5)
    save_figure(figure, target)


def _draw_shares(numbers: Numbers, labels: pd.Series[str], target: Path) -> None:
    """Energy over index at each run's last step: the updates, then MultiLoRA's with its start and without."""
    from matplotlib.figure import Figure

    shares = numbers.shares
    with look():
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        whole, parts = figure.subplots(1, 2, sharey=True)
        for run, rows in shares[shares["part"] == "update"].groupby("run", sort=False):
            if not str(run).endswith(SECOND):
                colour, line = _STYLE[str(run)]
                whole.plot(rows["index"], rows["share"], color=colour, linestyle=line, label=_at(labels, rows))
        multi = shares[shares["run"] == "multilora"]
        for (part, rows), style in zip(multi.groupby("part", sort=False), ("-", ":", "--"), strict=False):
            name = {"update": "ΔW", "start": "start: trained scaling, A and B as they began", "learned": "ΔW − start"}
            parts.plot(rows["index"], rows["share"], color=COLOURS[1], linestyle=style, label=name[str(part)])
        lora = shares[(shares["run"] == "lora")]
        if len(multi) and len(lora):
            parts.plot(lora["index"], lora["share"], color=COLOURS[0], label=_at(labels, lora))
        for ax, title in ((whole, "the update of every run"), (parts, "MultiLoRA's update and its start")):
            ax.set(yscale="log", ylim=(1e-5, 1), xlim=(0, 50), xlabel="index i", title=title)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=7.5)
        whole.set_ylabel("σᵢ² / Σσ², mean over matrices")
    save_figure(figure, target)


def _at(labels: pd.Series[str], rows: pd.DataFrame) -> str:
    return f"{labels[rows['run'].iloc[0]]}, step {rows['step'].iloc[0]}"
