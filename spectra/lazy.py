"""torch on first use: listing a model, `--help` and `import spectra` must not wait for it.

`from spectra.lazy import torch` at the top of a file is the one way in which `files/`, `deltas/`, `sources/` and
`merges/` get it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """The module, imported when something of it is asked for."""

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("torch"), name)

    torch = _Torch()
