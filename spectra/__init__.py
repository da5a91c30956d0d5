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
    from spectra.comparison import NotCompared as NotCompared
    from spectra.comparison import compare as compare
    from spectra.engine.decompose import decompose as decompose
    from spectra.errors import SpectraError as SpectraError
    from spectra.metrics import METRICS as METRICS
    from spectra.metrics.similarity import (
        SubspaceSimilarity as SubspaceSimilarity,
    )
    from spectra.metrics.similarity import (
        chance_level as chance_level,
    )
    from spectra.metrics.similarity import (
        principal_angles as principal_angles,
    )
    from spectra.metrics.similarity import (
        subspace_similarity as subspace_similarity,
    )
    from spectra.plots import (
        histogram_figure as histogram_figure,
    )
    from spectra.plots import (
        plot_histogram as plot_histogram,
    )
    from spectra.plots import (
        plot_similarity as plot_similarity,
    )
    from spectra.plots import (
        similarity_figure as similarity_figure,
    )
    from spectra.sources import FORMATS as FORMATS
    from spectra.sources import open_source as open_source
    from spectra.store import load as load
    from spectra.store import save as save
    from spectra.tables import summarize as summarize
    from spectra.types import (
        Coverage as Coverage,
    )
    from spectra.types import (
        Dense as Dense,
    )
    from spectra.types import (
        LowRank as LowRank,
    )
    from spectra.types import (
        Source as Source,
    )
    from spectra.types import (
        Spectrum as Spectrum,
    )
    from spectra.types import (
        WeightDelta as WeightDelta,
    )

# Public name → the module that holds it. Looked up on first use, so that `import spectra` loads no torch.
_PUBLIC = {
    "METRICS": "spectra.metrics",
    "FORMATS": "spectra.sources",
    "Coverage": "spectra.types",
    "Dense": "spectra.types",
    "LowRank": "spectra.types",
    "NotCompared": "spectra.comparison",
    "Source": "spectra.types",
    "SpectraError": "spectra.errors",
    "Spectrum": "spectra.types",
    "SubspaceSimilarity": "spectra.metrics.similarity",
    "WeightDelta": "spectra.types",
    "chance_level": "spectra.metrics.similarity",
    "compare": "spectra.comparison",
    "decompose": "spectra.engine.decompose",
    "histogram_figure": "spectra.plots",
    "load": "spectra.store",
    "open_source": "spectra.sources",
    "plot_histogram": "spectra.plots",
    "plot_similarity": "spectra.plots",
    "principal_angles": "spectra.metrics.similarity",
    "save": "spectra.store",
    "similarity_figure": "spectra.plots",
    "subspace_similarity": "spectra.metrics.similarity",
    "summarize": "spectra.tables",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'spectra' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
