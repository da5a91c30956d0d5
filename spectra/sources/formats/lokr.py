"""LoKr as PEFT saves it: ΔW = s·(w1 ⊗ w2), either side whole or a product, for linear layers and convolutions."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from spectra.deltas.products import KroneckerProduct, Product
from spectra.deltas.source import Source
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Slots, add_modules, add_rest, modules_of, refuse_heads, slot_pattern, unusable
from spectra.sources.formats.loha import check_scale, cp_product, scale_of
from spectra.sources.ledger import Ledger

KIND = "lokr"
_SLOTS = slot_pattern(r"lokr_w[12](?:_[ab])?|lokr_t2")


def matches(folder: Folder) -> bool:
    """Factors named lokr_w1 and lokr_w2 under the names that PEFT gives to modules."""
    return any(name.startswith("base_model.") and ".lokr_w" in name for name in folder.tensors)


def open_lokr(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module's two sides. PEFT's s is α/r also where both sides are stored whole.

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


def _update(tuned: Folder, given: float | None, module: str, slots: Slots) -> KroneckerProduct | str:
    why = unusable(slots, slots)
    if why:
        return why
    first, second = (_side(slots, index) for index in "12")
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    found = KroneckerProduct(first, second)
    if found.fault:
        return found.fault
    widths = {side.width for side in (first, second) if isinstance(side, Product)}
    if len(widths) > 1:
        return f"the factors of {module} have different ranks: {sorted(widths)}"
    s = scale_of(tuned, given, module, next(iter(widths), None))
    return s if isinstance(s, str) else replace(found, scale=s)


def _side(slots: Slots, index: str) -> TensorRef | Product | str:
    """One side of the product as a matrix, or what is wrong with it."""
    whole, a, b = (slots.get(f"lokr_w{index}{factor}") for factor in ("", "_a", "_b"))
    core = slots.get("lokr_t2") if index == "2" else None
    if whole is not None:
        if a is not None or b is not None or core is not None:
            return f"lokr_w{index} is stored both whole and as factors"
        if len(whole.shape) == 3:
            # PEFT pads the shapes from the left here, which shuffles the entries; LyCORIS does not.
            return (
                f"lokr_w{index} is the whole kernel of a 1-D convolution, which PEFT and LyCORIS multiply differently"
            )
        return whole if len(whole.shape) < 3 else whole.reshape(whole.shape[0], math.prod(whole.shape[1:]))
    if a is None or b is None:
        return f"lokr_w{index}{'_a' if a is None else '_b'} is missing"
    return cp_product(a, b, core)
