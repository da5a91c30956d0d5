"""DeLoRA: a sum of r rank-one terms of equal, learned size (Bini et al. 2025, eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from spectra.deltas.forms import LowRank
from spectra.deltas.source import Source
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules,
    add_rest,
    config_of,
    modules_of,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import rank_of

KIND = "delora"
_NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_SLOTS = slot_pattern("|".join(_NAMES))
_SHORTEST = 1e-4  # PEFT takes no vector's norm to be less


@dataclass(frozen=True)
class Normalised:
    """ΔW = B diag(λ / (r ‖bᵢ‖ ‖aᵢ‖)) A diag(w), wⱼ the norm of W₀'s column j.

    Attributes:
        down: A (r, in).
        up: B (out, r).
        size: λ (1,).
        column_norms: w (in,), saved with the adapter.
    """

    down: TensorRef
    up: TensorRef
    size: TensorRef
    column_norms: TensorRef

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The four tensors."""
        return (self.down, self.up, self.size, self.column_norms)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """r."""
        return min(self.down.shape[0], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The norms and λ in the left factor, w in the right one."""
        down, up = self.down.read_float64(device), self.up.read_float64(device)
        lengths = down.norm(dim=1).clamp(min=_SHORTEST) * up.norm(dim=0).clamp(min=_SHORTEST)
        sizes = self.size.read_float64(device) / (down.shape[0] * lengths)
        return LowRank(up * sizes, down * self.column_norms.read_float64(device))


def open_delora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the factors of every module.

    Raises:
        SourceError: the config is missing, or r in it is no number.
    """
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "DeLoRA")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules(ledger, modules, partial(_normalised, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _normalised(config: Mapping[str, Any], where: str, module: str, slots: Slots) -> Normalised | str:
    """The factors of one module, or why there are none."""
    why = unusable(slots, _NAMES)
    if why:
        return why
    down, up, size, norms = (slots[name] for name in _NAMES)
    r = rank_of(config, module, where)
    if len(down.shape) != 2 or down.shape[0] != r:
        return f"the config says r = {r} for {module}, delora_A in {where} is {list(down.shape)}"
    if len(up.shape) != 2 or up.shape[1] != r or size.shape != (1,) or norms.shape != (down.shape[1],):
        return f"the tensors of {module} do not fit: {', '.join(f'{n} {list(slots[n].shape)}' for n in _NAMES)}"
    return Normalised(down, up, size, norms)
