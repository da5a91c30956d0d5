"""Full checkpoints: ΔW = tuned − base, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spectra.errors import BaseRequiredError
from spectra.naming import role_of
from spectra.sources import architectures
from spectra.sources.folder import Folder
from spectra.sources.ledger import Ledger
from spectra.sources.pairing import align
from spectra.sources.recipes import Difference
from spectra.sources.tensors import TensorRef
from spectra.types import Source

KIND = "checkpoint"
_VOCABULARY = ("embed_tokens", "lm_head")


def matches(folder: Folder) -> bool:
    """Anything with tensors that is not an adapter."""
    return not folder.is_adapter


def open_checkpoint(
    tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None
) -> Source:
    """Pair every weight of the tuned model with the base's.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the two share no weight.
    """
    if base is None:
        raise BaseRequiredError(f"{tuned.path} holds full weights, so ΔW needs the model it started from: pass --base")
    ledger = Ledger(tuned, base)
    if scale is not None:
        ledger.warnings.append("scale was ignored: full weights carry no scale")
    names, rule = align(_shapes(tuned), _shapes(base))
    if rule:
        ledger.warnings.append(rule)
    stored = {new: old for old, new in names.items()}
    config = tuned.config or base.config
    for name in [*base.tensors, *base.broken]:
        if name in stored:
            _pair(ledger, name, stored[name], config, split)
        else:
            ledger.base_only[name] = "not in the tuned model"
    for name, old in stored.items():
        if name not in base.tensors and name not in base.broken:
            ledger.tuned_only[old] = "not in the base"
    return ledger.source(KIND)


def _shapes(folder: Folder) -> dict[str, tuple[int, ...]]:
    return {name: ref.shape for name, ref in folder.tensors.items()} | dict.fromkeys(folder.broken, ())


def _pair(ledger: Ledger, name: str, stored: str, config: Mapping[str, Any], split: bool) -> None:
    """One name that both models have."""
    assert ledger.base is not None
    base, tuned = ledger.base.tensors.get(name), ledger.tuned.tensors.get(stored)
    if base is None or tuned is None:
        known = base or tuned
        why = ledger.tuned.broken.get(stored) or ledger.base.broken[name]
        ledger.refuse(name, known.shape if known else (), "unreadable", why)
        return
    why = _not_a_matrix(tuned, base)
    if why:
        ledger.skipped[name] = why
        return
    coded = [ref for ref in (tuned, base) if not ref.is_float]
    if coded:
        why = f"stored as {coded[0].dtype} in {coded[0].path}: quantised weights are not decoded"
        ledger.refuse(name, base.shape, "unsupported", why)
        return
    tuned, base = (as_matrix(architectures.oriented(config, name, ref)) for ref in (tuned, base))
    subtract(ledger, name, tuned, base, config, split)


def subtract(
    ledger: Ledger,
    name: str,
    tuned: TensorRef,
    base: TensorRef,
    config: Mapping[str, Any],
    split: bool,
) -> None:
    """Enter tuned − base of two matrices in Linear orientation, in its parts where it is fused.

    Where the vocabulary was resized, the rows that both have are compared; any other difference in
    shape is refused.
    """
    note = ""
    if tuned.shape != base.shape:
        why = f"tuned is {list(tuned.shape)}, base is {list(base.shape)}"
        if role_of(name) not in _VOCABULARY or tuned.shape[1:] != base.shape[1:]:
            ledger.refuse(name, base.shape, "shape_mismatch", why)
            return
        rows = min(tuned.shape[0], base.shape[0])
        note = f"the first {rows} rows, which both have: {why}"
        ledger.shape_mismatch[name] = note
        tuned, base = tuned.rows(0, rows), base.rows(0, rows)
    cuts = architectures.parts(config, name, base.shape[0]) if split else {}
    for part, cut in cuts.items():
        ledger.add(f"{name}[{part}]", cut(base).shape, Difference(cut(tuned), cut(base)), note=note)
    if not cuts:
        ledger.add(name, base.shape, Difference(tuned, base), note=note)


def _not_a_matrix(tuned: TensorRef, base: TensorRef) -> str:
    if len(base.shape) < 2 and len(tuned.shape) < 2:
        return "a vector, not a matrix"
    if not base.numel or not tuned.numel:
        return "empty"
    if {base.dtype, tuned.dtype} <= {"I64", "BOOL"}:
        return f"a buffer of {base.dtype}, not weights"
    return ""


def as_matrix(ref: TensorRef) -> TensorRef:
    """A convolution (out, in, k, …) as (out, in·k·…)."""
    return ref if len(ref.shape) <= 2 else ref.reshape(ref.shape[0], math.prod(ref.shape[1:]))
