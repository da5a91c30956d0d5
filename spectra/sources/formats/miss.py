"""MiSS, and Bone as it was called before: one small block of rows, repeated along the inputs (Kang & Yin 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense, LowRank
from spectra.deltas.recipes import FromTensors, OnBase
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Repeated(FromTensors):
    """ΔW = Bᵀ repeated along the inputs, the last copy cut off: [I; …; I] Bᵀ [I … I] of rank at most min(r, c).

    Attributes:
        block: B (r, c), c = out or, repeated along the outputs as well ("mini"), a divisor of it.
        shape: (out, in).
    """

    factored = True
    block: TensorRef
    shape: tuple[int, int]

    @property
    def rank(self) -> int:
        """At most the block's smaller side: the copies add none."""
        return min(*self.block.shape, *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The block in one factor and repeated identities in the other, whichever way is narrower."""
        block = self.block.read_float64(device)
        out, inputs = self.shape
        if block.shape[0] <= block.shape[1]:
            return LowRank(_tiled(block.T, out), _tiled(torch.eye(block.shape[0]).to(block), inputs).T)
        return LowRank(_tiled(torch.eye(block.shape[1]).to(block), out), _tiled(block, inputs).T)


def _tiled(matrix: Tensor, rows: int) -> Tensor:
    """The matrix below itself until there are so many rows."""
    copies = -(-rows // matrix.shape[0])
    return matrix.repeat(copies, 1)[:rows]


@dataclass(frozen=True)
class BlockAffine(OnBase):
    """ΔW = W_{gh} B_g + B_g for each r×r block at row block g and column block h of W₀ ("bat").

    Attributes:
        blocks: B (out/r, r, r).
    """

    blocks: TensorRef

    def from_base(self, base: Tensor) -> Dense:
        """Row block by row block."""
        blocks = self.blocks.read_float64(str(base.device))
        number, r, _ = blocks.shape
        cut = base.reshape(number, r, -1, r)
        delta = torch.einsum("gihk,gkj->gihj", cut, blocks) + blocks.unsqueeze(2)
        return Dense(delta.reshape(base.shape))


def read(ledger: Ledger) -> None:
    """Enter the block of every module.

    Raises:
        SourceError: the config names a variant that is not known, or r in it is no number.
    """
    variant = ledger.config.get("init_weights")
    if not isinstance(variant, bool) and variant not in ("bat", "mini"):
        raise SourceError(
            f"{ledger.where}: init_weights = {variant!r} is none of true, false, bat, mini; mend the config"
        )
    modules = ledger.modules(slot_pattern("miss_block|bone_block"))
    add_modules_on_base(ledger, modules, partial(_update, ledger.config, variant))


def _update(config: Config, variant: bool | str, module: str, slots: Slots, base: TensorRef) -> Repeated | BlockAffine:
    """The update of one module, whose block must be what the config makes for the base's weight."""
    if len(slots) != 1:
        raise Refusal(f"{module} has both a miss_block and a bone_block in {config.where}")
    (slot,) = slots
    (block,) = slots.real(slot)
    (out, inputs), r = base.shape, config.count("r")
    if variant == "bat":
        wanted: tuple[int, ...] = (out // r, r, r)
        fits = out % r == 0 and inputs % r == 0
    else:
        columns = config.count("mini_r") if variant == "mini" else out
        wanted = (r, columns)
        fits = out % columns == 0 and r <= inputs
    if block.shape != wanted or not fits:
        raise Refusal(
            f"{slot} {list(block.shape)} of {module} is not what r = {r} and init_weights = {variant!r} make for "
            f"the base weight {list(base.shape)}"
        )
    return BlockAffine(base, block) if variant == "bat" else Repeated(block, (out, inputs))
