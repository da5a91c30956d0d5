"""AdaLoRA: ΔW = s·B·diag(E)·A, of which training has pruned ranks (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

from spectra.deltas.recipes import Factors, Term
from spectra.errors import SourceError
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.formats.trainable_tokens import add_tokens
from spectra.sources.ledger import Ledger

_EPSILON = 1e-5  # PEFT's guard against a division by zero, which it adds for every rank


def read(ledger: Ledger) -> None:
    """Enter the factors of every module, and trained tokens beside them.

    The divisor of the scale is the rank before pruning (`init_r`), whatever ranks are left.
    """
    initial, alpha = ledger.config.count("init_r"), ledger.config.real("lora_alpha")
    s = (alpha if alpha > 0 else float(initial)) / (initial + _EPSILON)
    kept = _kept_ranks(ledger)

    def build(module: str, slots: Slots) -> Factors:
        A, B, E = slots.real("lora_A", "lora_B", "lora_E")
        if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != A.shape[0] or E.shape != (A.shape[0], 1):
            shapes = f"lora_A {list(A.shape)}, lora_E {list(E.shape)}, lora_B {list(B.shape)}"
            raise Refusal(f"{shapes} are not (r, in), (r, 1), (out, r)")
        expected = kept.get(module, initial)
        if A.shape[0] != expected:
            raise Refusal(f"the config says that {expected} ranks are left, the factors have {A.shape[0]}")
        return Factors((Term((B,), A, s, inner_scale=E),))

    add_modules(ledger, ledger.modules(slot_pattern("lora_[ABE]")), build)
    add_tokens(ledger)


def _kept_ranks(ledger: Ledger) -> dict[str, int]:
    """module → how many ranks its mask in `rank_pattern` leaves."""
    pattern = ledger.config.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping) or not all(isinstance(mask, list) for mask in pattern.values()):
        raise SourceError(f"{ledger.where}: rank_pattern is not an object of module: mask; mend adapter_config.json")
    kept = {}
    for name, mask in pattern.items():
        module, end, _ = name.rpartition(".lora_E")
        kept[module if end else name] = sum(entry is True or entry == 1 for entry in mask)
    return kept
