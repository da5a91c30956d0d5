"""Measurements: one function per metric, and the table of those that make a column."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from spectra.metrics import dominance, rank
from spectra.metrics.signal import of_signal
from spectra.spectrum import Spectrum

METRICS: dict[str, Callable[[Spectrum], float]] = {
    "norm": dominance.frobenius_norm,
    "sigma_1": dominance.spectral_norm,
    "relative_norm": dominance.relative_norm,
    "stable_rank": rank.stable_rank,
    "effective_rank": rank.effective_rank,
    "energy_entropy_rank": rank.energy_entropy_rank,
    "participation_ratio": rank.participation_ratio,
    "nuclear_rank": rank.nuclear_rank,
    "rank_90": partial(rank.rank_at, share=0.90),
    "rank_95": partial(rank.rank_at, share=0.95),
    "rank_99": partial(rank.rank_at, share=0.99),
    "top_1_share": partial(dominance.top_k_share, k=1),
    "top_8_share": partial(dominance.top_k_share, k=8),
    "top_value_share": dominance.top_value_share,
    "gini_max_rank": dominance.gini,
    "gini_all": dominance.gini_all,
    "top_20_share": partial(dominance.top_k_share, k=20),
}
# The same of what is above the rounding edge; equal to the plain ones where no edge is known.
METRICS |= {
    f"signal_{name}": of_signal(METRICS[name])
    for name in (
        "norm", "stable_rank", "effective_rank", "energy_entropy_rank", "participation_ratio", "nuclear_rank",
        "rank_90", "rank_95", "rank_99", "top_1_share", "top_8_share",
    )
}  # fmt: skip
