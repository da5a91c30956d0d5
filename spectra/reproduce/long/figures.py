"""Curves along training: what the spectra do, what the start has to do with it, and whether runs agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spectra.plots import save_figure
from spectra.plots.panels import panelled, put_label, put_legend_of, put_title, unbroken
from spectra.plots.sizes import DEFAULT, arranged
from spectra.plots.style import COLOURS, legend_below, new_axes, stroke
from spectra.reproduce.long.numbers import Numbers
from spectra.reproduce.long.plan import FULL_ADAM, LORA, MULTILORA, SECOND

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL, _SHARES, _LETTERS = (18.0, 16.5), (27.0, 34.0), 20  # ems of panels, and characters along the first's height
_MOST_STEPS = 5  # whose numbers stand under a panel

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
        ax.plot(known[against], known[quantity], color=colour, linestyle=line, linewidth=stroke(0.5 if again else 1.0),
                marker=".", label=label)  # fmt: skip
    if quantity in _LOG:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if against == "step":
        ax.set_xscale("log", base=2)
        steps = sorted(set(table.loc[table["step"] > 0, "step"]))
        told = steps if len(steps) <= _MOST_STEPS else steps[::2]
        ax.set_xticks(told, [f"{step:,}" for step in told])
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
    """A panel for each quantity that has values; its title says what became of it in the two runs that are compared."""
    # Before the runs that a quantity needs have begun there is nothing to draw of it.
    quantities = tuple(name for name in quantities if (table.loc[table["step"] > 0, name] > 0).any())
    layout = arranged(DEFAULT, len(quantities), _PANEL, above=7.0, stretched=True)
    with panelled(layout) as (figure, axes):
        for ax, quantity in zip(axes, quantities, strict=False):
            plot_along(table, quantity, against=against, ax=ax)
            put_label(ax, NAMES[quantity], _LETTERS)
            put_title(ax, _from_to(table, quantity), layout)
            if quantity in _CHANCE:
                _draw_chance(ax, float(table[_CHANCE[quantity]].mean()))
        if {"rank_90", "learned_rank_90"} <= set(quantities):
            places = [axes[quantities.index(name)] for name in ("rank_90", "learned_rank_90")]
            limits = [limit for ax in places for limit in ax.get_ylim()]
            for ax in places:
                ax.set_ylim(min(limits), max(limits))
        put_legend_of(figure, axes, layout)
    save_figure(figure, target)


def _from_to(table: pd.DataFrame, quantity: str) -> str:
    """LoRA's and MultiLoRA's numbers at their first and their last step.

    >>> import pandas as pd
    >>> _from_to(pd.DataFrame({"run": ["lora", "lora"], "step": [50, 100], "loss": [0.812, 0.5]}), "loss").split()
    ['LoRA', '0.81', 'to', '0.5']
    """
    told = []
    for run, name in ((LORA, "LoRA"), (MULTILORA, "MultiLoRA")):
        known = table[(table["run"] == run) & (table["step"] > 0) & table[quantity].notna()].sort_values("step")
        if len(known) and known[quantity].iloc[-1]:
            first, last = known[quantity].iloc[0], known[quantity].iloc[-1]
            told.append(unbroken(f"{name} {first:.2g} to {last:.2g}"))
    return ", ".join(told)


def _draw_chance(ax: Axes, level: float) -> None:
    """A dotted line, named beside the panel, where it covers no curve."""
    ax.axhline(level, color="0.5", linestyle=":", linewidth=stroke(0.8))
    ax.annotate("chance", (1.01, level), xycoords=("axes fraction", "data"), va="center", fontsize="x-small",
                annotation_clip=False)  # fmt: skip


def _draw_shares(numbers: Numbers, labels: pd.Series[str], target: Path) -> None:
    save_figure(_shares_figure(numbers, labels), target)


def _shares_figure(numbers: Numbers, labels: pd.Series[str]) -> Figure:
    """Energy over index at each run's last step: the updates, then MultiLoRA's with its start and without."""
    shares = numbers.shares
    layout = arranged(DEFAULT, 2, _SHARES, stretched=True)
    with panelled(layout) as (figure, (whole, parts)):
        for run, rows in shares[shares["part"] == "update"].groupby("run", sort=False):
            if not str(run).endswith(SECOND):
                colour, line = _STYLE[str(run)]
                whole.plot(rows["index"], rows["share"], color=colour, linestyle=line, label=_at(labels, rows))
        multi = shares[shares["run"] == MULTILORA]
        for (part, rows), style in zip(multi.groupby("part", sort=False), ("-", ":", "--"), strict=False):
            name = {"update": "ΔW", "start": "start: trained scaling, A and B as they began", "learned": "ΔW − start"}
            parts.plot(rows["index"], rows["share"], color=COLOURS[1], linestyle=style, label=name[str(part)])
        lora = shares[(shares["run"] == LORA)]
        if len(multi) and len(lora):
            parts.plot(lora["index"], lora["share"], color=COLOURS[0], label=_at(labels, lora))
        for ax, title in ((whole, "the update of every run"), (parts, "MultiLoRA's update and its start")):
            ax.set(yscale="log", ylim=(1e-5, 1), xlim=(0, 50), xlabel="index i")
            put_title(ax, title, layout)
            if ax.get_legend_handles_labels()[0]:
                legend_below(ax)
        put_label(whole, "σᵢ² / Σσ², mean over matrices", 2 * _LETTERS)
    return figure


def _at(labels: pd.Series[str], rows: pd.DataFrame) -> str:
    return f"{labels[rows['run'].iloc[0]]}, step {rows['step'].iloc[0]}"
