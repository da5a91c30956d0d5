"""HiRA: every weight is multiplied by an entry of a low-rank matrix, ΔW = W₀ ∘ (B·A) (Huang et al. 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Modulated(OnBase):
    """ΔW = W₀ ∘ (B·A), of rank up to r·rank(W₀).

    Attributes:
        left: B (out, r).
        right: A (r, in).
    """

    left: TensorRef
    right: TensorRef

    def from_base(self, base: Tensor) -> Dense:
        """Entry by entry."""
        device = str(base.device)
        return Dense(base * (self.left.read_float64(device) @ self.right.read_float64(device)))


def read(ledger: Ledger) -> None:
    """Enter the factors of every module, in the base's orientation."""
    config = ledger.config

    def build(module: str, slots: Slots, base: TensorRef) -> Modulated:
        embedding = any("embedding" in slot for slot in slots)
        down, up = slots.real(*(f"hira_embedding_{x}" if embedding else f"hira_{x}" for x in "AB"))
        shapes = f"the factors {list(down.shape)} and {list(up.shape)} of {module}"
        if len(down.shape) < 2 or len(up.shape) < 2 or math.prod(up.shape[2:]) != 1:
            raise Refusal(f"{shapes} are no matrices")
        down = down.reshape(down.shape[0], math.prod(down.shape[1:]))  # a convolution's A has its kernel
        up = up.reshape(up.shape[0], up.shape[1])
        if down.shape[0] != up.shape[1]:
            raise Refusal(f"{shapes} cannot be multiplied")
        r = config.rank(module)
        if down.shape[0] not in (r, config.get("r")):  # PEFT 0.21 keeps r whatever rank_pattern says
            raise Refusal(f"the config says r = {r} for {module}, the factors in {ledger.where} have {down.shape[0]}")
        left, right = (down.T, up.T) if embedding else (up, down)  # an embedding's weight is (vocabulary, dim)
        if (left.shape[0], right.shape[1]) != base.shape:
            raise Refusal(f"{shapes} do not fit the base weight {list(base.shape)}")
        return Modulated(base, left, right)

    add_modules_on_base(ledger, ledger.modules(slot_pattern("hira_A|hira_B|hira_embedding_A|hira_embedding_B")), build)
