"""AdaLoRA: ΔW = s·B·diag(E)·A, of which training has pruned ranks (Zhang et al. 2023, eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from spectra.deltas.recipes import Factors, Term
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.sources.adapter import (
    Slots,
    add_modules,
    add_rest,
    config_of,
    count,
    modules_of,
    real,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.formats.trainable_tokens import add_tokens
from spectra.sources.ledger import Ledger

KIND = "adalora"
_SLOTS = slot_pattern("lora_[ABE]")
_EPSILON = 1e-5  # PEFT's guard against a division by zero, which it adds for every rank


def open_adalora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module's factors.

    The divisor of the scale is the rank before pruning (`init_r`), whatever ranks are left.

    Raises:
        SourceError: the config is missing or unusable.
    """
    config = config_of(tuned, "the scale of AdaLoRA")
    initial, alpha = count(config, "init_r", tuned.path), real(config, "lora_alpha", tuned.path)
    s = (alpha if alpha > 0 else float(initial)) / (initial + _EPSILON)
    kept = _kept_ranks(config, tuned)
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules(ledger, modules, partial(_update, kept, initial, s), split=split)
    add_rest(ledger, add_tokens(ledger, rest), split=split)
    return ledger.source(KIND)


def _update(kept: Mapping[str, int], initial: int, s: float, module: str, slots: Slots) -> Factors | str:
    why = unusable(slots, ("lora_A", "lora_B", "lora_E"))
    if why:
        return why
    A, B, E = slots["lora_A"], slots["lora_B"], slots["lora_E"]
    if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != A.shape[0] or E.shape != (A.shape[0], 1):
        return (
            f"lora_A {list(A.shape)}, lora_E {list(E.shape)}, lora_B {list(B.shape)} are not (r, in), (r, 1), (out, r)"
        )
    expected = kept.get(module, initial)
    if A.shape[0] != expected:
        return f"the config says that {expected} ranks are left, the factors have {A.shape[0]}"
    return Factors((Term((B,), A, s, inner_scale=E),))


def _kept_ranks(config: Mapping[str, Any], tuned: Folder) -> dict[str, int]:
    """module → how many ranks its mask in `rank_pattern` leaves."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping) or not all(isinstance(mask, list) for mask in pattern.values()):
        raise SourceError(f"{tuned.path}: rank_pattern is not an object of module: mask; mend adapter_config.json")
    kept = {}
    for name, mask in pattern.items():
        module, found, _ = name.rpartition(".lora_E")
        kept[module if found else name] = sum(entry is True or entry == 1 for entry in mask)
    return kept
