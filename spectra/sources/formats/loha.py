"""LoHa as PEFT saves it: ΔW = s·(w1_a·w1_b) ∘ (w2_a·w2_b), for linear layers and convolutions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from spectra.deltas.products import HadamardProduct, Product
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules,
    add_rest,
    modules_of,
    refuse_heads,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import scaling

KIND = "loha"
_SLOTS = slot_pattern(r"hada_w[12]_[ab]|hada_t[12]")


def matches(folder: Folder) -> bool:
    """Factors named hada_w1_a under the names that PEFT gives to modules."""
    return any(name.startswith("base_model.") and ".hada_w" in name for name in folder.tensors)


def open_loha(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module's four factors, and the two cores of an effective convolution.

    Raises:
        SourceError: the config is missing or unusable.
    """
    ledger = Ledger(tuned, base)
    refuse_heads(ledger, heads)
    check_scale(ledger, scale)
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules(ledger, modules, partial(_update, tuned, scale), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _update(tuned: Folder, given: float | None, module: str, slots: Slots) -> HadamardProduct | str:
    cores = [slot for slot in ("hada_t1", "hada_t2") if slot in slots]
    needed = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *(["hada_t1", "hada_t2"] if cores else [])]
    why = unusable(slots, needed)
    if why:
        return why
    first, second = (cp_product(slots[f"hada_w{i}_a"], slots[f"hada_w{i}_b"], slots.get(f"hada_t{i}")) for i in (1, 2))
    found = HadamardProduct(first, second)
    if found.fault:
        return found.fault
    s = scale_of(tuned, given, module, first.width)
    return s if isinstance(s, str) else replace(found, scale=s)


def cp_product(a: TensorRef, b: TensorRef, core: TensorRef | None) -> Product:
    """a·b, or with a core, beside which LyCORIS stores a as (r, out), aᵀ·(core ×₂ b)."""
    return Product(a, b) if core is None or len(a.shape) != 2 else Product(a.T, b, core)


def check_scale(ledger: Ledger, given: float | None) -> None:
    """Say what becomes of a given scale.

    Raises:
        SourceError: neither a config nor the user says it.
    """
    tuned = ledger.tuned
    if tuned.adapter_config is None and given is None:
        raise SourceError(
            f"{tuned.path} has no adapter_config.json beside it, so α/r is unknown: put the config back or pass --scale"
        )
    if tuned.adapter_config is not None and given is not None:
        ledger.warnings.append("scale was ignored: adapter_config.json carries α and r")


def scale_of(tuned: Folder, given: float | None, module: str, width: int | None) -> float | str:
    """α/r of a module, or why it cannot be: the factors' width, where they have one, must be the config's r.

    Raises:
        SourceError: r or α in the config is unusable.
    """
    if tuned.adapter_config is None:
        return float(given or 0.0)
    s, rank = scaling(tuned.adapter_config, module, str(tuned.path), alpha_key="alpha")
    if width is not None and width != rank:
        return f"the config says r = {rank} for {module}, the factors have {width}"
    return s
