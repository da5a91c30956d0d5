"""Loading torch, the largest part of a short command."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch inside: no garbage is looked for meanwhile, nor ever again among what the import leaves.

    These are 170,000 objects that live as long as the process. The collector would walk over them
    again and again, and once more at exit: a fifth of what the import takes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
