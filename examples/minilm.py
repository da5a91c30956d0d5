"""Do the updates of a layer's query and key act on the same input directions?

Reads what `spectra svd --top 30 --out DIR` stored for the MiniLM fine-tune (`make demo` does that),
draws one heatmap per layer into DIR and prints the numbers behind them.

    python examples/minilm.py .demo/minilm
"""

from __future__ import annotations

import sys
from pathlib import Path

import spectra
from spectra.plots import save_figure

TOP = 30


def main(directory: str) -> None:
    """One panel per layer: φ(i, j) between ΔW of the query and of the key, on the input side."""
    stored = spectra.load(directory)
    panels = {}
    for query in stored.select("q_proj"):
        key = stored[query.name.replace("query", "key")]
        panels[f"layer {query.layer}"] = spectra.subspace_similarity(query, key, top=TOP, side="right")
    figure = spectra.similarity_figure(
        panels, title="MiniLM fine-tune: input directions of ΔW", labels=("ΔW of the query", "ΔW of the key")
    )
    print(f"{'':10}φ({TOP}, {TOP})  chance")
    for name, similarity in panels.items():
        print(f"{name:10}{similarity.phi:9.3f}{similarity.chance[-1, -1]:8.3f}")
    for path in save_figure(figure, Path(directory) / "query-key"):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".demo/minilm")
