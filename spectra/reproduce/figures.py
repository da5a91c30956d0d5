"""The papers' figures: 1, 4 and 5 through `spectra plot`, 3 from measured costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.plots import save_figure
from spectra.plots.panels import panelled, put_title
from spectra.plots.sizes import DEFAULT, arranged
from spectra.plots.style import curves, marked, new_axes, stroke
from spectra.reproduce.analysis import ALL, ATTENTION, Look, pairs, similarity_of, spectra_of
from spectra.reproduce.commands import Commands
from spectra.reproduce.plan import REFERENCE, YARDSTICK, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {
    "lora": "LoRA",
    "multilora": "MultiLoRA",
    "rlora": "R-LoRA",
    "multihead": "multi-head LoRA",
    "full": "full fine-tuning",
}
_STYLE = dict(zip(_KINDS, curves(), strict=False))
_PANEL = (23.0, 20.0)  # ems
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
        colour, mark = _STYLE[kind]
        if kind == "full":
            ax.axhline(places[0][1], color="0.4", linewidth=stroke(0.8), label=_KINDS[kind])
        else:
            x, y = zip(*sorted(places), strict=True)
            ax.plot(x, y, color=colour, label=_KINDS[kind], **marked(mark))
    ax.set_ylim(0, 1.12 * max(value for places in groups.values() for _, value in places))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("number of heads N" if against == "heads" else "total rank n·r")
    ax.set_ylabel(COSTS[quantity])
    return ax


def draw_costs(costs: list[dict[str, Any]], pictures: Path) -> None:
    """Figure 3: LoRA against MultiLoRA above, R-LoRA against multi-head LoRA below."""
    pictures.mkdir(parents=True, exist_ok=True)
    save_figure(costs_figure(costs), pictures / "cost")


def costs_figure(costs: Sequence[Mapping[str, Any]], *, size: str = DEFAULT) -> Figure:
    """Both costs against total rank and against heads; a panel's title says how much of full fine-tuning's they are.

    Args:
        costs: as for `plot_cost`.
        size: "column", "page" or "slide".
    """
    rows = (("total_rank", ("lora", "multilora", "full")), ("heads", ("rlora", "multihead", "full")))
    panels = [(against, kinds, quantity) for against, kinds in rows for quantity in COSTS]
    layout = arranged(size, len(panels), _PANEL, above=1.5 * len(_KINDS), stretched=True)
    with panelled(layout) as (figure, axes):
        for ax, (against, kinds, quantity) in zip(axes, panels, strict=False):
            chosen = [row for row in costs if row["kind"] in kinds]
            plot_cost(chosen, quantity, against=against, ax=ax)
            put_title(ax, _of_full(chosen, quantity), layout)
        handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        columns = min(len(handles), max(layout.whole // 26, 1))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    return figure


def _of_full(costs: Sequence[Mapping[str, Any]], quantity: str) -> str:
    """The range of a cost as a share of full fine-tuning's, for each kind."""
    whole = next((row[quantity] for row in costs if row["kind"] == "full"), None)
    if not whole:
        return COSTS[quantity]
    shares: dict[str, list[float]] = {}
    for row in costs:
        shares.setdefault(row["kind"], []).append(100 * row[quantity] / whole)
    said = [f"{_KINDS[kind]} {_span(found)} %" for kind, found in shares.items() if kind != "full"]
    return f"{COSTS[quantity]}, of full fine-tuning's:\n{', '.join(said)}"


def _span(found: Sequence[float]) -> str:
    low, high = f"{min(found):.0f}", f"{max(found):.0f}"
    return low if low == high else f"{low} to {high}"
