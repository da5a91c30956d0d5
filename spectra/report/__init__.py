"""The page: everything that a run's directory holds as one HTML file that works from a disk, without a network."""

from __future__ import annotations

from spectra.report.page import write_report

__all__ = ["write_report"]
