"""LoHa as PEFT saves it: ΔW = s·(w1_a·w1_b) ∘ (w2_a·w2_b), for linear layers and convolutions."""

from __future__ import annotations

from dataclasses import replace

from spectra.deltas.products import HadamardProduct, Product
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.ledger import Ledger

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


def matches(folder: Folder) -> bool:
    """Factors named hada_w1_a under the names that PEFT gives to modules."""
    return any(name.startswith("base_model.") and ".hada_w" in name for name in folder.tensors)


def read(ledger: Ledger) -> None:
    """Enter every module's four factors, and the two cores of an effective convolution."""

    def build(module: str, slots: Slots) -> HadamardProduct:
        update = hadamard_product(slots)
        return replace(update, scale=ledger.scale_of(module, update.first.width, alpha_key="alpha"))

    add_modules(ledger, ledger.modules(slot_pattern("|".join((*_FACTORS, *_CORES)))), build)


def hadamard_product(slots: Slots) -> HadamardProduct:
    """The product for s = 1.

    Raises:
        Refusal: a tensor is missing, or they do not fit.
    """
    slots.real(*_FACTORS, *(_CORES if slots.keys() & set(_CORES) else ()))
    first, second = (cp_product(slots[f"hada_w{i}_a"], slots[f"hada_w{i}_b"], slots.get(f"hada_t{i}")) for i in (1, 2))
    product = HadamardProduct(first, second)
    if product.fault:
        raise Refusal(product.fault)
    return product


def cp_product(a: TensorRef, b: TensorRef, core: TensorRef | None) -> Product:
    """a·b, or with a core, beside which LyCORIS stores a as (r, out), aᵀ·(core ×₂ b)."""
    return Product(a, b) if core is None or len(a.shape) != 2 else Product(a.T, b, core)
