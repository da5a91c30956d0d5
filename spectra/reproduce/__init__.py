"""The papers' experiment end to end: train on a multi-task mix, then look at the updates with the toolkit's commands.

base, wordnet, tasks   what is trained on        methods, plan, train, evaluate   the runs
cost                   throughput and memory     analysis, figures, numbers       what they say
"""

from __future__ import annotations

from spectra.reproduce.experiment import reproduce
from spectra.reproduce.plan import FULL, QUICK, Plan, Run

__all__ = ["FULL", "QUICK", "Plan", "Run", "reproduce"]
