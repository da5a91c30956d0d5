"""LoKr as PEFT saves it: ΔW = s·(w1 ⊗ w2), either side whole or a product, for linear layers and convolutions."""

from __future__ import annotations

import math
from dataclasses import replace

from spectra.deltas.products import KroneckerProduct, Product
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.formats.loha import cp_product
from spectra.sources.ledger import Ledger


def matches(folder: Folder) -> bool:
    """Factors named lokr_w1 and lokr_w2 under the names that PEFT gives to modules."""
    return any(name.startswith("base_model.") and ".lokr_w" in name for name in folder.tensors)


def read(ledger: Ledger) -> None:
    """Enter every module's two sides. PEFT's s is α/r also where both sides are stored whole."""

    def build(module: str, slots: Slots) -> KroneckerProduct:
        product = _product(slots)
        widths = {side.width for side in (product.first, product.second) if isinstance(side, Product)}
        if len(widths) > 1:
            raise Refusal(f"the factors of {module} have different ranks: {sorted(widths)}")
        return replace(product, scale=ledger.scale_of(module, next(iter(widths), None), alpha_key="alpha"))

    add_modules(ledger, ledger.modules(slot_pattern("lokr_w[12](?:_[ab])?|lokr_t2")), build)


def _product(slots: Slots) -> KroneckerProduct:
    """The product for s = 1; a tensor that is one too many is as wrong as one that is missing."""
    slots.real(*slots)
    product = KroneckerProduct(_side(slots, "1"), _side(slots, "2"))
    if product.fault:
        raise Refusal(product.fault)
    return product


def _side(slots: Slots, index: str) -> TensorRef | Product:
    """One side of the product as a matrix."""
    whole, a, b = (slots.get(f"lokr_w{index}{factor}") for factor in ("", "_a", "_b"))
    core = slots.get("lokr_t2") if index == "2" else None
    if whole is None:
        if a is None or b is None:
            raise Refusal(f"lokr_w{index}{'_a' if a is None else '_b'} is missing")
        return cp_product(a, b, core)
    if a is not None or b is not None or core is not None:
        raise Refusal(f"lokr_w{index} is stored both whole and as factors")
    if len(whole.shape) == 3:
        # PEFT pads the shapes from the left here, which shuffles the entries; LyCORIS does not.
        raise Refusal(
            f"lokr_w{index} is the whole kernel of a 1-D convolution, which PEFT and LyCORIS multiply differently"
        )
    return whole if len(whole.shape) < 3 else whole.reshape(whole.shape[0], math.prod(whole.shape[1:]))
