"""`python -m spectra`."""

from __future__ import annotations

from spectra.cli import main

main(prog_name="spectra")
