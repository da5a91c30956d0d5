"""DeLoRA: a sum of r rank-one terms of equal, learned size (Bini et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import FromTensors
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.ledger import Ledger

_NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_SHORTEST = 1e-4  # PEFT takes no vector's norm to be less


@dataclass(frozen=True)
class Normalised(FromTensors):
    """ΔW = B diag(λ / (r ‖bᵢ‖ ‖aᵢ‖)) A diag(w), wⱼ the norm of W₀'s column j.

    Attributes:
        down: A (r, in).
        up: B (out, r).
        size: λ (1,).
        column_norms: w (in,), saved with the adapter.
    """

    factored = True
    down: TensorRef
    up: TensorRef
    size: TensorRef
    column_norms: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """At most r, one for each term."""
        return min(self.down.shape[0], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The norms and λ in the left factor, w in the right one."""
        down, up = self.down.read_float64(device), self.up.read_float64(device)
        lengths = down.norm(dim=1).clamp(min=_SHORTEST) * up.norm(dim=0).clamp(min=_SHORTEST)
        sizes = self.size.read_float64(device) / (down.shape[0] * lengths)
        return LowRank(up * sizes, down * self.column_norms.read_float64(device))


def read(ledger: Ledger) -> None:
    """Enter the factors of every module."""

    def build(module: str, slots: Slots) -> Normalised:
        down, up, size, norms = slots.real(*_NAMES)
        r = ledger.config.rank(module)
        if len(down.shape) != 2 or down.shape[0] != r:
            raise Refusal(f"the config says r = {r} for {module}, delora_A in {ledger.where} is {list(down.shape)}")
        if len(up.shape) != 2 or up.shape[1] != r or size.shape != (1,) or norms.shape != (down.shape[1],):
            shapes = ", ".join(f"{name} {list(slots[name].shape)}" for name in _NAMES)
            raise Refusal(f"the tensors of {module} do not fit: {shapes}")
        return Normalised(down, up, size, norms)

    add_modules(ledger, ledger.modules(slot_pattern("|".join(_NAMES))), build)
