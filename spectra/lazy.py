"""torch and numpy on first use: listing a model, `--help` and `import spectra` must not wait for them.

`from spectra.lazy import torch` at the top of a file is the one way in which `files/`, `deltas/`, `sources/` and
`merges/` get it; numpy (half of what `inspect` would take) is got so by what a listing reads.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
else:

    class _Lazy:
        """A module, imported when something of it is asked for."""

        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, name: str) -> Any:
            # Not by import_module each time: a small matrix asks for a hundred things of torch.
            return getattr(sys.modules.get(self._name) or importlib.import_module(self._name), name)

    torch, numpy = _Lazy("torch"), _Lazy("numpy")
