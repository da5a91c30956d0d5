"""Two stored matrices of one weight, entered as tuned − base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectra.deltas.recipes import Difference
from spectra.files.tensors import TensorRef
from spectra.models import architectures, tied
from spectra.naming import role_of
from spectra.sources.ledger import Ledger

_VOCABULARY = ("embed_tokens", "lm_head")


def subtract(
    ledger: Ledger,
    name: str,
    tuned: TensorRef,
    base: TensorRef,
    config: Mapping[str, Any],
    split: bool,
    note: str = "",
) -> None:
    """Enter tuned − base of two matrices in Linear orientation, in its parts where it is fused.

    Where the vocabulary was resized, the rows that both have are compared; any other difference in
    shape is refused.
    """
    if tuned.shape != base.shape:
        why = f"tuned is {list(tuned.shape)}, base is {list(base.shape)}"
        by_token = role_of(name) in _VOCABULARY or tied.is_vocabulary(name)
        rows = min(tuned.shape[0], base.shape[0]) if tuned.shape and base.shape else 0
        if not by_token or tuned.shape[1:] != base.shape[1:] or not rows:
            ledger.refuse(name, base.shape, "shape_mismatch", why)
            return
        common = f"the first {rows} rows, which both have: {why}"
        note = f"{note}; {common}" if note else common
        ledger.shape_mismatch[name] = common
        tuned, base = tuned.rows(0, rows), base.rows(0, rows)
    cuts = architectures.parts(config, name, base.shape[0]) if split else {}
    for part, cut in cuts.items():
        ledger.add(f"{name}[{part}]", cut(base).shape, Difference(cut(tuned), cut(base)), note=note)
    if not cuts:
        ledger.add(name, base.shape, Difference(tuned, base), note=note)
