"""Loading torch, the largest part of a short command, and matplotlib while others work."""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


def load_drawing() -> threading.Thread:
    """Begin to import what figures are drawn with: a second that need not be waited for when all is computed.

    Only modules of others, which nobody imports meanwhile; where one cannot be loaded, whoever draws hears of it.
    """
    loading = threading.Thread(target=_load_drawing, name="drawing")
    loading.start()
    return loading


def _load_drawing() -> None:
    with suppress(ImportError):
        for name in ("figure", "backends.backend_agg", "backends.backend_pdf"):
            importlib.import_module(f"matplotlib.{name}")
