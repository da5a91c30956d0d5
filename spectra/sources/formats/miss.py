"""MiSS, and Bone as it was called before: one small block of rows, repeated along the inputs (Kang & Yin 2024, §3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.deltas.forms import Dense, LowRank
from spectra.deltas.recipes import OnBase
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    config_of,
    count,
    modules_of,
    need_base,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "miss"
_SLOTS = slot_pattern("miss_block|bone_block")


@dataclass(frozen=True)
class Repeated:
    """ΔW = Bᵀ repeated along the inputs, the last copy cut off: [I; …; I] Bᵀ [I … I] of rank at most min(r, c).

    Attributes:
        block: B (r, c), c = out or, repeated along the outputs as well ("mini"), a divisor of it.
        shape: (out, in).
    """

    block: TensorRef
    shape: tuple[int, int]

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The block."""
        return (self.block,)

    @property
    def rank(self) -> int:
        """min(r, c)."""
        return min(*self.block.shape, *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The block in one factor and repeated identities in the other, whichever way is narrower."""
        import torch

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
        base: W₀ (out, in).
        blocks: (out/r, r, r).
    """

    blocks: TensorRef

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the blocks."""
        return (self.base, self.blocks)

    def read(self, device: str = "cpu") -> Dense:
        """Row block by row block."""
        import torch

        base = self.base.read_float64(device)
        blocks = self.blocks.read_float64(device)
        number, r, _ = blocks.shape
        cut = base.reshape(number, r, -1, r)
        delta = torch.einsum("gihk,gkj->gihj", cut, blocks) + blocks.unsqueeze(2)
        return Dense(delta.reshape(base.shape), base_norm=float(base.norm()))


def open_miss(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the block of every module.

    Raises:
        BaseRequiredError: there is no base; the file does not say how many inputs a module has.
        SourceError: the config is missing, or names a variant that is not known.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "MiSS", "is repeated along the base weight's inputs")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "MiSS")
    variant = config.get("init_weights")
    if not isinstance(variant, bool) and variant not in ("bat", "mini"):
        raise SourceError(
            f"{tuned.path}: init_weights = {variant!r} is none of true, false, bat, mini; mend the config"
        )
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_update, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _update(
    config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef
) -> Repeated | BlockAffine | str:
    """The update of one module, or why there is none."""
    if len(slots) != 1:
        return f"{module} has both a miss_block and a bone_block in {where}"
    slot, block = next(iter(slots.items()))
    why = unusable(slots, [slot])
    if why:
        return why
    out, inputs = base.shape
    r, variant = count(config, "r", where), config.get("init_weights")
    if variant == "bat":
        wanted: tuple[int, ...] = (out // r, r, r)
        fits = out % r == 0 and inputs % r == 0
    else:
        columns = count(config, "mini_r", where) if variant == "mini" else out
        wanted = (r, columns)
        fits = out % columns == 0 and r <= inputs
    if block.shape != wanted or not fits:
        return (
            f"{slot} {list(block.shape)} of {module} is not what r = {r} and init_weights = {variant!r} make for "
            f"the base weight {list(base.shape)}"
        )
    return BlockAffine(base, block) if variant == "bat" else Repeated(block, (out, inputs))
