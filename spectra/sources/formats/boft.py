"""BOFT: W₀ turned by a product of block-diagonal rotations between butterfly permutations (Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.formats.oft import CayleyMap, rotation_minus_identity, times_blocks
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Butterfly(OnBase):
    """ΔW = diag(s) W₀ Qᵀ − W₀ with Q = Q_N ⋯ Q₁, Qᵢ = Pᵢ bd(Rᵢ) Pᵢᵀ, Rᵢ the Cayley maps of the blocks.

    Attributes:
        blocks: (N, n, b, b), whose antisymmetric parts are mapped.
        scales: s (out,).
    """

    copies = 6
    blocks: TensorRef
    scales: TensorRef

    def from_base(self, base: Tensor) -> Dense:
        """Turn W₀ by one factor after the other; neither a Q nor a P is formed."""
        device = str(base.device)
        blocks = self.blocks.read_float64(device)
        factors, _, size, _ = blocks.shape
        turned = base
        for index in range(factors):
            order = _butterfly_order(base.shape[1], size, index if factors > 1 else 0, device)
            turn = rotation_minus_identity((blocks[index] - blocks[index].mT) / 2, CayleyMap())
            moved = times_blocks(turned[:, order.argsort()], turn.mT)
            turned = turned + moved[:, order]
        scales = self.scales.read_float64(device).reshape(-1, 1)
        return Dense(scales * (turned - base) + (scales - 1) * base)


def _butterfly_order(inputs: int, size: int, level: int, device: str) -> Tensor:
    """Pᵢ as an order of the inputs: in groups of 2^level blocks, the even half blocks before the odd ones."""
    order = torch.arange(inputs, device=device)
    if level == 0:
        return order
    halves = order.reshape(-1, 2 ** (level + 1), size // 2)
    return torch.cat((halves[:, 0::2], halves[:, 1::2]), 1).flatten()


def read(ledger: Ledger) -> None:
    """Enter the blocks and scales of every module.

    The number of factors is the tensor's: PEFT without its CUDA extension trains one whatever the config says.
    """

    def build(module: str, slots: Slots, base: TensorRef) -> Butterfly:
        blocks, scales = slots.real("boft_R", "boft_s")
        if len(blocks.shape) != 4 or blocks.shape[2] != blocks.shape[3] or not blocks.numel:
            raise Refusal(f"boft_R {list(blocks.shape)} of {module} is not (factors, blocks, size, size)")
        factors, number, size, _ = blocks.shape
        if number * size != base.shape[1] or scales.shape not in ((base.shape[0], 1), (1, base.shape[0])):
            raise Refusal(
                f"boft_R {list(blocks.shape)} and boft_s {list(scales.shape)} of {module} do not fit "
                f"the base weight {list(base.shape)}"
            )
        if factors > 1 and (size % 2 or number % 2 ** (factors - 1)):
            raise Refusal(
                f"boft_R {list(blocks.shape)} of {module}: {factors} butterfly factors do not pair its blocks"
            )
        for key, there in (("boft_block_size", size), ("boft_block_num", number)):
            said = ledger.config.get(key)
            if isinstance(said, int) and said > 0 and said != there:
                raise Refusal(
                    f"the config says {key} = {said} for {module}, the tensors in {ledger.where} have {there}"
                )
        return Butterfly(base, blocks, scales.reshape(base.shape[0]))

    add_modules_on_base(ledger, ledger.modules(slot_pattern("boft_R|boft_s")), build)
