"""Does MultiLoRA's flat spectrum survive training, once A and B have left their start? A small model, trained long.

plan, sequences   what is trained on what      train, experiment   the runs, two at a time
measure, pairs    every snapshot in numbers    rule                what those decide; figures, page   and how they look
"""

from __future__ import annotations

from spectra.reproduce.long.experiment import reproduce_long
from spectra.reproduce.long.plan import LONG, QUICK_LONG, LongPlan, LongRun

__all__ = ["LONG", "QUICK_LONG", "LongPlan", "LongRun", "reproduce_long"]
