"""MultiLoRA and R-LoRA to train, under the name that users import: see `spectra.training`."""

from __future__ import annotations

from spectra.training import *  # noqa: F403
from spectra.training import __all__ as __all__
