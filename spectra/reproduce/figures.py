"""The papers' figures: 1, 4 and 5 through `spectra plot`, 3 from measured costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.plots import save_figure
from spectra.plots.style import curves, look, new_axes
from spectra.reproduce.analysis import ALL, ATTENTION, Look, pairs, similarity_of, spectra_of
from spectra.reproduce.commands import Commands
from spectra.reproduce.plan import REFERENCE, YARDSTICK, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = {
    "lora": "LoRA",
    "multilora": "MultiLoRA",
    "rlora": "R-LoRA",
    "multihead": "multi-head LoRA",
    "full": "full fine-tuning",
}
_STYLE: dict[str, tuple[str, Any]] = {**dict(zip(_KINDS, curves(), strict=False)), "full": ("0.4", ":")}
COSTS = {"tokens_per_second": "tokens per second", "peak_mib": "peak memory, MiB"}


def draw_spectra(directory: Path, plan: Plan, pictures: Path, commands: Commands) -> None:
    """Figures 1, 4 and 5 of the main runs, each into a folder of its own with the numbers behind it.

    Reference: Wang et al. 2023, Figs. 1, 4, 5.
    """
    last = {run.name: Look(run, plan.steps, ALL) for run in plan.main_runs()}
    methods = [item for name, item in last.items() if name != YARDSTICK]
    _histogram(directory, pictures / "figure-1", "v_proj", [last[REFERENCE], last["lora"]], commands)
    for role in ATTENTION:
        _histogram(directory, pictures / f"figure-5-{role}", role, methods, commands)
    compared = [(a, b) for a, b in pairs(plan) if a in last.values() and b.run.name == REFERENCE]
    compared.sort(key=lambda pair: pair[0].run.name == YARDSTICK)  # the yardstick comes last
    labels = [word for first, _ in compared for word in ("--label", _label(first))]
    folders = [similarity_of(directory, *pair) for pair in compared]
    for role in ATTENTION:
        commands.run("plot", *folders, *labels, "--layer", role, "--side", "left",
                     "--title", "similarity to full fine-tuning", "--out", pictures / f"figure-4-{role}")  # fmt: skip


def _histogram(directory: Path, target: Path, role: str, items: Iterable[Look], commands: Commands) -> None:
    words: list[str | Path] = []
    for item in items:
        words += [spectra_of(directory, item), "--label", _label(item)]
    commands.run("plot", *words, "--layer", role, "--title", f"ΔW of {role}", "--out", target)


def _label(item: Look) -> str:
    return item.run.method.label + (f", seed {item.run.seed}" if item.run.seed else "")


def plot_cost(
    costs: Iterable[Mapping[str, Any]], quantity: str, *, against: str = "total_rank", ax: Axes | None = None
) -> Axes:
    """One measured cost of training against total rank n·r, or against the number of heads.

    Args:
        costs: rows with `kind`, `n`, `r` and the quantity, as `measure_costs` gives them.
        quantity: a key of COSTS.
        against: "total_rank" or "heads".
        ax: where to draw; None for a new figure.

    Reference: Wang et al. 2023, Fig. 3.
    """
    from matplotlib.ticker import MaxNLocator

    ax = new_axes(ax)
    groups: dict[str, list[tuple[int, float]]] = {}
    for row in costs:
        x = row["n"] if against == "heads" else row["r"] * (row["n"] if row["kind"] == "multilora" else 1)
        groups.setdefault(row["kind"], []).append((x, row[quantity]))
    for kind, places in groups.items():
        colour, line = _STYLE[kind]
        if kind == "full":
            ax.axhline(places[0][1], color=colour, linestyle=line, linewidth=1.2, label=_KINDS[kind])
        else:
            x, y = zip(*sorted(places), strict=True)
            ax.plot(x, y, color=colour, linestyle=line, marker="o", markersize=4, label=_KINDS[kind])
    ax.set_ylim(0, 1.12 * max(value for places in groups.values() for _, value in places))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("number of heads N" if against == "heads" else "total rank n·r")
    ax.set_ylabel(COSTS[quantity])
    return ax


def draw_costs(costs: list[dict[str, Any]], pictures: Path) -> None:
    """Figure 3: LoRA against MultiLoRA above, R-LoRA against multi-head LoRA below."""
    from matplotlib.figure import Figure

    pictures.mkdir(parents=True, exist_ok=True)
    rows = (("total_rank", ("lora", "multilora", "full")), ("heads", ("rlora", "multihead", "full")))
    with look():
        figure = Figure(figsize=(9.0, 6.6), layout="constrained")
        for axes, (against, kinds) in zip(figure.subplots(2, 2), rows, strict=True):
            chosen = [row for row in costs if row["kind"] in kinds]
            for ax, quantity in zip(axes, COSTS, strict=True):
                plot_cost(chosen, quantity, against=against, ax=ax)
            axes[0].legend(fontsize=9, loc="lower left")
    save_figure(figure, pictures / "cost")
