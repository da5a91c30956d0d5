"""Measurements: one function per metric, and the table of those that make a column."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from spectra.metrics.dominance import (
    frobenius_norm,
    gini,
    gini_all,
    relative_norm,
    spectral_norm,
    top_k_share,
    top_value_share,
)
from spectra.metrics.rank import (
    effective_rank,
    energy_entropy_rank,
    nuclear_rank,
    participation_ratio,
    rank_at,
    stable_rank,
)
from spectra.metrics.signal import of_signal, signal
from spectra.spectrum import Spectrum

METRICS: dict[str, Callable[[Spectrum], float]] = {
    "norm": frobenius_norm,
    "sigma_1": spectral_norm,
    "relative_norm": relative_norm,
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
    "energy_entropy_rank": energy_entropy_rank,
    "participation_ratio": participation_ratio,
    "nuclear_rank": nuclear_rank,
    "rank_90": partial(rank_at, share=0.90),
    "rank_95": partial(rank_at, share=0.95),
    "rank_99": partial(rank_at, share=0.99),
    "top_1_share": partial(top_k_share, k=1),
    "top_8_share": partial(top_k_share, k=8),
    "top_value_share": top_value_share,
    "gini_max_rank": gini,
    "gini_all": gini_all,
    "top_20_share": partial(top_k_share, k=20),
}
# The same of what is above the rounding edge; equal to the plain ones where no edge is known.
METRICS |= {
    f"signal_{name}": of_signal(METRICS[name])
    for name in (
        "norm", "stable_rank", "effective_rank", "energy_entropy_rank", "participation_ratio", "nuclear_rank",
        "rank_90", "rank_95", "rank_99", "top_1_share", "top_8_share",
    )
}  # fmt: skip

__all__ = [
    "METRICS",
    "effective_rank",
    "energy_entropy_rank",
    "frobenius_norm",
    "gini",
    "gini_all",
    "nuclear_rank",
    "participation_ratio",
    "rank_at",
    "relative_norm",
    "signal",
    "spectral_norm",
    "stable_rank",
    "top_k_share",
    "top_value_share",
]
