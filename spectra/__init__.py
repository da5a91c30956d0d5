"""spectra: what did fine-tuning do to the weights?

Reads base and tuned models from files, forms the update ΔW, computes its singular spectrum and the
Grassmann similarity of its subspaces, and draws both.

    >>> import spectra
    >>> source = spectra.open_source("ckpt/", base="llama-7b")          # doctest: +SKIP
    >>> found = list(spectra.decompose(source.select("v_proj"), top=30)) # doctest: +SKIP
    >>> spectra.summarize(found)                                          # doctest: +SKIP
    >>> spectra.plot_histogram(found)                                     # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spectra._version import __version__

if TYPE_CHECKING:
    from spectra.deltas.delta import WeightDelta
    from spectra.deltas.forms import Dense, Kronecker, LowRank
    from spectra.deltas.source import Coverage, Source
    from spectra.engine.decompose import decompose
    from spectra.errors import SpectraError
    from spectra.metrics import METRICS
    from spectra.metrics.similarity import SubspaceSimilarity, chance_level, principal_angles, subspace_similarity
    from spectra.plots import histogram_figure, plot_histogram, plot_similarity, similarity_figure
    from spectra.results.comparison import NotCompared, compare
    from spectra.results.store import load, save
    from spectra.results.tables import summarize
    from spectra.sources import FORMATS, open_source
    from spectra.spectrum import Spectrum

__all__ = [
    "FORMATS",
    "METRICS",
    "Coverage",
    "Dense",
    "Kronecker",
    "LowRank",
    "NotCompared",
    "Source",
    "SpectraError",
    "Spectrum",
    "SubspaceSimilarity",
    "WeightDelta",
    "__version__",
    "chance_level",
    "compare",
    "decompose",
    "histogram_figure",
    "load",
    "open_source",
    "plot_histogram",
    "plot_similarity",
    "principal_angles",
    "save",
    "similarity_figure",
    "subspace_similarity",
    "summarize",
]

# Where each public name lives. Looked up on first use, so that `import spectra` loads no torch.
_HOMES = {
    "spectra.results.comparison": ("NotCompared", "compare"),
    "spectra.engine.decompose": ("decompose",),
    "spectra.errors": ("SpectraError",),
    "spectra.deltas.forms": ("Dense", "Kronecker", "LowRank"),
    "spectra.metrics": ("METRICS",),
    "spectra.metrics.similarity": (
        "SubspaceSimilarity",
        "chance_level",
        "principal_angles",
        "subspace_similarity",
    ),
    "spectra.plots": ("histogram_figure", "plot_histogram", "plot_similarity", "similarity_figure"),
    "spectra.sources": ("FORMATS", "open_source"),
    "spectra.results.store": ("load", "save"),
    "spectra.results.tables": ("summarize",),
    "spectra.deltas.delta": ("WeightDelta",),
    "spectra.deltas.source": ("Coverage", "Source"),
    "spectra.spectrum": ("Spectrum",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'spectra' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
