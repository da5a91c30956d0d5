"""Loading torch, the largest part of a short command."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from spectra.cli.interrupts import nothing_begun


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch inside: no garbage is looked for meanwhile, nor ever again among what the import leaves.

    These are 170,000 objects that live as long as the process. The collector would walk over them
    again and again, and once more at exit: a fifth of what the import takes. Ctrl-C ends the process.
    """
    gc.disable()
    try:
        with nothing_begun():
            yield
    finally:
        gc.freeze()
        gc.enable()
