"""HiRA: every weight is multiplied by an entry of a low-rank matrix, ΔW = W₀ ∘ (B·A) (Huang et al. 2025, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.deltas.source import Source
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    config_of,
    modules_of,
    need_base,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import rank_of

KIND = "hira"
_SLOTS = slot_pattern("hira_A|hira_B|hira_embedding_A|hira_embedding_B")


@dataclass(frozen=True)
class Modulated(OnBase):
    """ΔW = W₀ ∘ (B·A), of rank up to r·rank(W₀).

    Attributes:
        base: W₀ (out, in).
        left: B (out, r).
        right: A (r, in).
    """

    left: TensorRef
    right: TensorRef

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the factors."""
        return (self.base, self.left, self.right)

    def read(self, device: str = "cpu") -> Dense:
        """Entry by entry."""
        base = self.base.read_float64(device)
        factor = self.left.read_float64(device) @ self.right.read_float64(device)
        return Dense(base * factor, base_norm=float(base.norm()))


def open_hira(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the factors of every module.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is missing, or r in it is no number.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "HiRA")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "HiRA")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_modulated, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _modulated(config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef) -> Modulated | str:
    """The factors of one module in the base's orientation, or why there are none."""
    embedding = any("embedding" in slot for slot in slots)
    names = [f"hira_embedding_{x}" if embedding else f"hira_{x}" for x in "AB"]
    why = unusable(slots, names)
    if why:
        return why
    down, up = (slots[name] for name in names)
    shapes = f"the factors {list(down.shape)} and {list(up.shape)} of {module}"
    if len(down.shape) < 2 or len(up.shape) < 2 or math.prod(up.shape[2:]) != 1:
        return f"{shapes} are no matrices"
    down = down.reshape(down.shape[0], math.prod(down.shape[1:]))  # a convolution's A has its kernel
    up = up.reshape(up.shape[0], up.shape[1])
    if down.shape[0] != up.shape[1]:
        return f"{shapes} cannot be multiplied"
    r = rank_of(config, module, where)
    if down.shape[0] not in (r, config.get("r")):  # PEFT 0.21 keeps r whatever rank_pattern says
        return f"the config says r = {r} for {module}, the factors in {where} have {down.shape[0]}"
    left, right = (down.T, up.T) if embedding else (up, down)  # an embedding's weight is (vocabulary, dim)
    if (left.shape[0], right.shape[1]) != base.shape:
        return f"{shapes} do not fit the base weight {list(base.shape)}"
    return Modulated(base, left, right)
