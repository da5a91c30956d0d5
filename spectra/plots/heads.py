"""How alike the heads of a multi-head adapter are, over the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.plots.figures import DEFAULT_FORMATS, save_figure
from spectra.plots.interference import records, roles_over_depth_figure, write_over_depth
from spectra.plots.panels import above
from spectra.plots.sizes import DEFAULT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OVER_DEPTH: dict[str, tuple[str, str | float]] = {
    "cosine": ("mean cosine of heads B_k", 0.0),
    "update_cosine": ("mean cosine of B_k·A", 0.0),
    "norm": ("mean ‖B_k‖_F", math.nan),
}


def heads_figure(rows: Iterable[Mapping[str, Any]], *, title: str = "", size: str = DEFAULT) -> Figure:
    """The mean pairwise cosine of heads, that of their updates, and the heads' norm over the layers, a line per role.

    Args:
        rows: what `head_similarity` gives.
        title: above what the panels are.
        size: "column", "page" or "slide".

    Raises:
        SelectionError: no module in a layer has numbers.

    Reference: Liu et al. 2025 (R-LoRA), the figure of its heads' similarity.
    """
    told = above(title, "heads over the layers; dotted: by chance")
    return roles_over_depth_figure(rows, title=told, columns=_OVER_DEPTH, size=size)


def draw_heads(
    rows: Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    title: str = "",
    formats: Sequence[str] = DEFAULT_FORMATS,
    size: str = DEFAULT,
    end: str = "",
) -> list[Path]:
    """Draw `heads_figure` into a directory, beside its numbers; gives the files, whose names end in `end`."""
    table, path = records(rows), Path(out) / f"heads{end}"
    files = save_figure(heads_figure(table, title=title, size=size), path, formats)
    return [*files, write_over_depth(table, _OVER_DEPTH, path.with_name(f"heads_depth{end}"))]
