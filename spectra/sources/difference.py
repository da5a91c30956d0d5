"""Two stored matrices of one weight, entered as tuned − base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spectra.deltas.recipes import Difference
from spectra.files.tensors import TensorRef
from spectra.models import architectures, tied
from spectra.naming import role_of
from spectra.sources.ledger import Ledger
from spectra.sources.targets import Target

_VOCABULARY = ("embed_tokens", "lm_head")


def subtract(
    ledger: Ledger, name: str, tuned: TensorRef, base: Target, config: Mapping[str, Any], note: str = ""
) -> None:
    """Enter tuned − base of two matrices in Linear orientation, in its parts where it is fused.

    Where the vocabulary was resized, the rows that both have are compared; any other difference in
    shape is refused.

    Args:
        ledger: the account.
        name: what the result is called.
        tuned: the tuned weight (out, in).
        base: the base's weight.
        config: of the model, for what is fused.
        note: what to say beside the number.
    """
    old = base.ref
    assert old is not None
    if tuned.shape != old.shape:
        why = f"tuned is {list(tuned.shape)}, base is {list(old.shape)}"
        by_token = role_of(name) in _VOCABULARY or tied.is_vocabulary(name)
        rows = min(tuned.shape[0], old.shape[0]) if tuned.shape and old.shape else 0
        if not by_token or tuned.shape[1:] != old.shape[1:] or not rows:
            ledger.refuse(name, old.shape, "shape_mismatch", why)
            return
        common = f"the first {rows} rows, which both have: {why}"
        note = f"{note}; {common}" if note else common
        ledger.shape_mismatch[name] = common
        tuned, old = tuned.rows(0, rows), old.rows(0, rows)
        base = replace(base, ref=old)
    cuts = architectures.parts(config, name, old.shape[0]) if ledger.split else {}
    for part, cut in cuts.items():
        ledger.add(f"{name}[{part}]", cut(old).shape, Difference(cut(tuned), cut(old)), note=note, base=base.base(cut))
    if not cuts:
        ledger.add(name, old.shape, Difference(tuned, old), note=note, base=base.base())
