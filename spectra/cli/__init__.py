"""The command line: parses, calls the library, prints. One file per command; no maths here."""

from __future__ import annotations

from spectra.cli.interrupts import nothing_begun

with nothing_begun():
    from spectra.cli.main import main

__all__ = ["main"]
