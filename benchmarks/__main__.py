"""`python -m benchmarks`: print the table, and write it with the growth curves and a figure."""

from __future__ import annotations

import argparse
import csv
import platform
import re
import tempfile
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import programs, remote
from benchmarks.cases import cases
from benchmarks.growth import Point, points
from benchmarks.measure import Outcome, compare


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32, help="matrices of the full fine-tune")
    parser.add_argument("--out", type=Path, help="default: a folder of benchmarks/results named after the processor")
    parser.add_argument("--cpu", action="store_true", help="seconds of the cores, not of the clock: on a busy machine")
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / re.sub(r"\W+", "-", processor().lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    outcomes = []
    for case in (*cases(options.layers), *programs.cases(), *remote.cases()):
        if options.only in case.name:
            with tempfile.TemporaryDirectory() as folder:
                ours, peer = case.make(Path(folder))
                repeats = min(options.repeats, case.most_repeats or options.repeats)
                outcome = compare(
                    case.name, case.peer, case.wanted, ours, peer, repeats, by="cpu" if options.cpu else "seconds"
                )
            outcomes.append(outcome)
            print(line(outcome), flush=True)
            write_table(out, outcomes)
    for how in programs.missing():
        print(f"left out, not installed: {how}")
    if not options.only:
        grown = list(points(options.repeats))
        write_csv(out / "growth.csv", grown)
        draw(out / "benchmarks.png", outcomes, grown)


def machine() -> str:
    """What this ran on, and with which versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("weight-spectra", "torch", "numpy", "safetensors"))
    threads = f"{torch.get_num_threads()} threads"
    return f"{date.today()}: {processor()}, {threads}; Python {platform.python_version()}, {versions}"


def processor() -> str:
    """The processor's name."""
    if Path("/proc/cpuinfo").is_file():
        found = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
        if found:
            return found[0].split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


_COLUMNS = ("work", "peer", "wanted", "reached", "spread", "runs", "ours", "peer", "ours, MiB", "peer, MiB")
_HEADER = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"


def line(outcome: Outcome) -> str:
    """One row of the table."""
    o = outcome
    sizes = f"{o.ours_mib:.0f} | {o.peer_mib:.0f}" if o.ours_mib else "– | –"
    spread = f"{o.ratio_low:.2f}–{o.ratio_high:.2f}"
    return (
        f"| {o.case} | {o.peer} | {o.wanted:.3g}× | {o.ratio:.2f}× | {spread} | {o.repeats} "
        f"| {o.ours_s:.3f} s | {o.peer_s:.3f} s | {sizes} |"
    )


def write_table(out: Path, outcomes: list[Outcome]) -> None:
    """The table as Markdown and as CSV."""
    write_csv(out / "table.csv", [asdict(outcome) for outcome in outcomes])
    rows = "\n".join(map(line, outcomes))
    (out / "table.md").write_text(f"{machine()}; medians of runs in turn\n\n{_HEADER}\n{rows}\n")


def write_csv(path: Path, rows: list[Point]) -> None:
    """Rows with equal keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, outcomes: list[Outcome], grown: list[Point]) -> None:
    """Ratios beside what was wanted, and the growth curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh([o.case for o in outcomes], [o.ratio for o in outcomes], color="C0", alpha=0.75)
    for place, o in enumerate(outcomes):
        left.text(1.12 * max(o.ratio, o.wanted), place, f"{o.ratio:.3g}×", fontsize=8, va="center")
    left.plot([o.wanted for o in outcomes], range(len(outcomes)), "k|", markersize=14, label="wanted")
    left.set(xscale="log", xlabel="times as fast as the peer", title=processor())
    left.invert_yaxis()
    left.margins(x=0.12)
    left.legend(loc="center right")
    for what in dict.fromkeys(point["what"] for point in grown):
        curve = [point for point in grown if point["what"] == what]
        right.plot([p["x"] for p in curve], [p["seconds"] for p in curve], "o-", label=what)
    right.set(xscale="log", yscale="log", xlabel="size, rank or number", ylabel="seconds", title="how time grows")
    right.grid(alpha=0.25)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
