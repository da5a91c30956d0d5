"""spectra: what did fine-tuning do to the weights?

Reads base and tuned models from files, forms the update ΔW, computes its singular spectrum and the
Grassmann similarity of its subspaces, and draws both.

    >>> import spectra
    >>> source = spectra.open_source("ckpt/", base="llama-7b")                 # doctest: +SKIP
    >>> found = spectra.decompose(source.select("v_proj"), top=30).collect()   # doctest: +SKIP
    >>> found.to_frame()                                                       # doctest: +SKIP
    >>> spectra.plot_histogram(found)                                          # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spectra._version import __version__ as __version__

# The public names, and where each lives. Looked up on first use, so that `import spectra` loads no torch.
_HOMES = {
    "spectra.deltas.delta": ("WeightDelta",),
    "spectra.deltas.forms": ("Dense", "Kronecker", "LowRank"),
    "spectra.deltas.source": ("Coverage", "Source"),
    "spectra.errors": ("SpectraError",),
    "spectra.extraction.extract": ("extract",),
    "spectra.extraction.ranks": ("rank_plan",),
    "spectra.merges.report": ("MergeReport",),
    "spectra.merges.verify": ("verify_merge",),
    "spectra.metrics": ("METRICS",),
    "spectra.metrics.alignment": ("ALIGNMENT",),
    "spectra.metrics.interference": ("INTERFERENCE",),
    "spectra.metrics.similarity": ("SubspaceSimilarity", "chance_level", "principal_angles", "subspace_similarity"),
    "spectra.plots": (
        "cosines_figure",
        "deciles_figure",
        "depth_figure",
        "draw_interference",
        "draw_pairs",
        "draw_results",
        "heads_figure",
        "histogram_figure",
        "kept_energy_figure",
        "pairs_figure",
        "plot_cosines",
        "plot_deciles",
        "plot_depth",
        "plot_histogram",
        "plot_kept_energy",
        "plot_roles_over_depth",
        "plot_scree",
        "plot_series",
        "plot_similarity",
        "plot_square",
        "roles_over_depth_figure",
        "scree_figure",
        "series_figure",
        "similarity_figure",
        "squares_figure",
        "tops_figure",
        "verdicts_figure",
    ),
    "spectra.report": ("write_report",),
    "spectra.results.alignment": ("alignment",),
    "spectra.results.all_pairs": ("compare_all",),
    "spectra.results.collection": ("Spectra", "load", "save"),
    "spectra.results.heads": ("head_similarity",),
    "spectra.results.inspection": ("Inspection", "inspect"),
    "spectra.results.interference": ("interference",),
    "spectra.results.intruders": ("intruders",),
    "spectra.results.pair_folders": ("load_pairs",),
    "spectra.results.pairs": ("Pair", "Pairs"),
    "spectra.results.series": ("series",),
    "spectra.results.similarities": ("NotCompared", "pool_by_role"),
    "spectra.results.soundness": ("check_results",),
    "spectra.results.streams": ("Decomposition", "compare", "decompose"),
    "spectra.results.tables": ("summarize", "summarize_similarity"),
    "spectra.sources": ("FORMATS", "open_source"),
    "spectra.spectrum": ("Spectrum",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])

if TYPE_CHECKING:  # the list above for type checkers, which follow imports only; a test holds the two together
    from spectra.deltas.delta import WeightDelta as WeightDelta
    from spectra.deltas.forms import Dense as Dense
    from spectra.deltas.forms import Kronecker as Kronecker
    from spectra.deltas.forms import LowRank as LowRank
    from spectra.deltas.source import Coverage as Coverage
    from spectra.deltas.source import Source as Source
    from spectra.errors import SpectraError as SpectraError
    from spectra.extraction.extract import extract as extract
    from spectra.extraction.ranks import rank_plan as rank_plan
    from spectra.merges.report import MergeReport as MergeReport
    from spectra.merges.verify import verify_merge as verify_merge
    from spectra.metrics import METRICS as METRICS
    from spectra.metrics.alignment import ALIGNMENT as ALIGNMENT
    from spectra.metrics.interference import INTERFERENCE as INTERFERENCE
    from spectra.metrics.similarity import SubspaceSimilarity as SubspaceSimilarity
    from spectra.metrics.similarity import chance_level as chance_level
    from spectra.metrics.similarity import principal_angles as principal_angles
    from spectra.metrics.similarity import subspace_similarity as subspace_similarity
    from spectra.plots import cosines_figure as cosines_figure
    from spectra.plots import deciles_figure as deciles_figure
    from spectra.plots import depth_figure as depth_figure
    from spectra.plots import draw_interference as draw_interference
    from spectra.plots import draw_pairs as draw_pairs
    from spectra.plots import draw_results as draw_results
    from spectra.plots import heads_figure as heads_figure
    from spectra.plots import histogram_figure as histogram_figure
    from spectra.plots import kept_energy_figure as kept_energy_figure
    from spectra.plots import pairs_figure as pairs_figure
    from spectra.plots import plot_cosines as plot_cosines
    from spectra.plots import plot_deciles as plot_deciles
    from spectra.plots import plot_depth as plot_depth
    from spectra.plots import plot_histogram as plot_histogram
    from spectra.plots import plot_kept_energy as plot_kept_energy
    from spectra.plots import plot_roles_over_depth as plot_roles_over_depth
    from spectra.plots import plot_scree as plot_scree
    from spectra.plots import plot_series as plot_series
    from spectra.plots import plot_similarity as plot_similarity
    from spectra.plots import plot_square as plot_square
    from spectra.plots import roles_over_depth_figure as roles_over_depth_figure
    from spectra.plots import scree_figure as scree_figure
    from spectra.plots import series_figure as series_figure
    from spectra.plots import similarity_figure as similarity_figure
    from spectra.plots import squares_figure as squares_figure
    from spectra.plots import tops_figure as tops_figure
    from spectra.plots import verdicts_figure as verdicts_figure
    from spectra.report import write_report as write_report
    from spectra.results.alignment import alignment as alignment
    from spectra.results.all_pairs import compare_all as compare_all
    from spectra.results.collection import Spectra as Spectra
    from spectra.results.collection import load as load
    from spectra.results.collection import save as save
    from spectra.results.heads import head_similarity as head_similarity
    from spectra.results.inspection import Inspection as Inspection
    from spectra.results.inspection import inspect as inspect
    from spectra.results.interference import interference as interference
    from spectra.results.intruders import intruders as intruders
    from spectra.results.pair_folders import load_pairs as load_pairs
    from spectra.results.pairs import Pair as Pair
    from spectra.results.pairs import Pairs as Pairs
    from spectra.results.series import series as series
    from spectra.results.similarities import NotCompared as NotCompared
    from spectra.results.similarities import pool_by_role as pool_by_role
    from spectra.results.soundness import check_results as check_results
    from spectra.results.streams import Decomposition as Decomposition
    from spectra.results.streams import compare as compare
    from spectra.results.streams import decompose as decompose
    from spectra.results.tables import summarize as summarize
    from spectra.results.tables import summarize_similarity as summarize_similarity
    from spectra.sources import FORMATS as FORMATS
    from spectra.sources import open_source as open_source
    from spectra.spectrum import Spectrum as Spectrum


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'spectra' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
