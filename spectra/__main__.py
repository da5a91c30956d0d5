"""`python -m spectra`."""

from __future__ import annotations

from spectra.cli import main

if __name__ == "__main__":  # and not where another process looks for what this one calls
    main(prog_name="spectra")
