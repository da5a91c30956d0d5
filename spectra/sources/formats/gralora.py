"""GraLoRA: the weight in k × k blocks, each with a low-rank update of its own (Jung et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.ledger import Ledger

_BLOCKS = ("gralora_A", "gralora_B")
_HYBRID = ("gralora_A_general", "gralora_B_general")


@dataclass(frozen=True)
class Granular(FromTensors):
    """ΔW = s·(blocks + B_g A_g), block (j, n) of rank r/k: the n-th part of B_j's rows times the j-th of A_n's columns.

    As factors of width k·r: left bd(B_1ᵀ, …, B_kᵀ), right the columns of A sorted by output block.

    Attributes:
        down: A (k, in/k, r).
        up: B (k, r, out/k).
        scale: s = α/(r + hybrid r).
        general: (B_g, A_g), a plain LoRA beside the blocks, or None.
    """

    factored = True
    down: TensorRef
    up: TensorRef
    scale: float
    general: tuple[TensorRef, TensorRef] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        k = self.down.shape[0]
        return (k * self.up.shape[2], k * self.down.shape[1])

    @property
    def rank(self) -> int:
        """At most k·r, and the plain LoRA's."""
        k, _, r = self.down.shape
        return min(k * r + (self.general[1].shape[0] if self.general else 0), *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The blocks at their places in both factors."""
        down, up = self.down.read_float64(device), self.up.read_float64(device)
        k, inputs, r = down.shape
        left = up.new_zeros(k, up.shape[2], k, r)  # output block j, output, j, column
        right = down.new_zeros(k, k, r // k, k, inputs)  # output block j, input block n, s, input block, input
        parts = down.reshape(k, inputs, k, r // k).permute(2, 0, 3, 1)  # j, n, s, input
        for n in range(k):
            left[n, :, n] = up[n].T
            right[:, n, :, n] = parts[:, n]
        left, right = left.reshape(-1, k * r), right.reshape(k * r, -1)
        if self.general:
            left = torch.cat((left, self.general[0].read_float64(device)), 1)
            right = torch.cat((right, self.general[1].read_float64(device)), 0)
        return LowRank(self.scale * left, right)


def read(ledger: Ledger) -> None:
    """Enter the blocks of every module, and the plain LoRA beside them where the adapter is a hybrid."""

    def build(module: str, slots: Slots) -> Granular:
        r, k, hybrid = ledger.config.count("r"), ledger.config.count("gralora_k"), _hybrid_rank(ledger)
        mixed = bool(hybrid or set(_HYBRID) & set(slots))
        down, up, *plain = slots.real(*_BLOCKS, *(_HYBRID if mixed else ()))
        if len(down.shape) != 3 or len(up.shape) != 3 or (down.shape[0], down.shape[2], *up.shape[:2]) != (k, r, k, r):
            raise Refusal(
                f"the config says r = {r} and gralora_k = {k} for {module}, gralora_A and gralora_B in {ledger.where} "
                f"are {list(down.shape)} and {list(up.shape)}"
            )
        if r % k:
            raise Refusal(f"r = {r} of {module} is not divisible by gralora_k = {k}")
        granular = Granular(down, up, ledger.config.real("alpha") / (r + hybrid))
        if not mixed:
            return granular
        right, left = plain
        if right.shape != (hybrid, granular.shape[1]) or left.shape != (granular.shape[0], hybrid):
            raise Refusal(
                f"the config says hybrid_r = {hybrid} for {module}, the plain factors in {ledger.where} are "
                f"{list(left.shape)} and {list(right.shape)}"
            )
        return replace(granular, general=(left, right))

    add_modules(ledger, ledger.modules(slot_pattern("|".join((*_HYBRID, *_BLOCKS)))), build)


def _hybrid_rank(ledger: Ledger) -> int:
    """The rank of the plain LoRA beside the blocks, 0 for none."""
    hybrid = ledger.config.get("hybrid_r", 0)
    if isinstance(hybrid, bool) or not isinstance(hybrid, int) or hybrid < 0:
        raise SourceError(f"{ledger.where}: hybrid_r = {hybrid!r} is no rank; mend adapter_config.json")
    return hybrid
