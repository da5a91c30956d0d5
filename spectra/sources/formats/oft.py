"""OFT: W₀ is turned by a block-diagonal rotation of its inputs, ΔW = W₀(Rᵀ − I) (Qiu et al. 2023, §3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.deltas.forms import Dense
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
    flag,
    modules_of,
    need_base,
    real,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "oft"
_SLOTS = slot_pattern("oft_R|oft_embedding_R")
_MOST_TERMS = 1000  # of the series; PEFT's default is 5, and a hostile config may ask for any number


@dataclass(frozen=True)
class CayleyMap:
    """How a skew-symmetric Q becomes the rotation R.

    Attributes:
        powers: None for R = (I − Q)(I + Q)⁻¹; else R = I + 2Q + 2Q² + … up to this power, whose sign of
            Q is the opposite one.
        halved: whether the last power counts once rather than twice.
        radius: the largest ‖Q‖_F that each block may have (COFT), or None.
    """

    powers: int | None = None
    halved: bool = False
    radius: float | None = None


@dataclass(frozen=True)
class Rotated(OnBase):
    """ΔW = W₀(Rᵀ − I) of a linear layer or convolution, W₀(R − I) of an embedding.

    Attributes:
        base: W₀ (out, in).
        angles: the entries above the diagonals of Q's blocks, a row for each block, or one row for all.
        block: the size b of a block.
        cayley: from Q to R.
        embedding: whether W₀'s rows are turned as they are, and not by the transpose.
    """

    angles: TensorRef
    block: int
    cayley: CayleyMap
    embedding: bool = False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the angles."""
        return (self.base, self.angles)

    @property
    def rank(self) -> int:
        """A skew-symmetric block of odd size has no full rank, and R − I has no more than Q."""
        blocks = self.shape[1] // self.block
        return min(self.shape[0], blocks * (self.block - self.block % 2))

    def read(self, device: str = "cpu") -> Dense:
        """R − I from Q without forming R, then the blocks of W₀ times those of R − I."""
        base = self.base.read_float64(device)
        turn = rotation_minus_identity(_skew(self.angles.read_float64(device), self.block), self.cayley)
        return Dense(times_blocks(base, turn if self.embedding else turn.mT), base_norm=float(base.norm()))


def times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """matrix (out, in) times the block-diagonal matrix of the blocks (n, b, b), or of one block repeated."""
    size = blocks.shape[-1]
    cut = matrix.reshape(matrix.shape[0], -1, size).transpose(0, 1)
    return (cut @ blocks).transpose(0, 1).reshape(matrix.shape)


def rotation_minus_identity(skew: Tensor, cayley: CayleyMap) -> Tensor:
    """R − I for each skew-symmetric Q (n, b, b).

    Exactly, (I − Q)(I + Q)⁻¹ − I = −2Q(I + Q)⁻¹; or the first powers of (I + Q)(I − Q)⁻¹ − I = 2Q + 2Q² + ….
    """
    import torch

    if cayley.radius is not None:
        norms = skew.norm(dim=(1, 2), keepdim=True)
        skew = torch.where(norms > cayley.radius, skew * (cayley.radius / norms), skew)
    if cayley.powers is None:
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(identity + skew, -2 * skew, left=False)
    power = skew
    total = torch.zeros_like(skew)
    for exponent in range(1, cayley.powers + 1):
        total = total + (1 if cayley.halved and exponent == cayley.powers else 2) * power
        power = power @ skew
    return total


def _skew(angles: Tensor, block: int) -> Tensor:
    import torch

    rows, columns = torch.triu_indices(block, block, 1, device=angles.device)
    upper = angles.new_zeros(angles.shape[0], block, block)
    upper[:, rows, columns] = angles
    return upper - upper.mT


def open_oft(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the rotation of every module.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is missing, or does not say how R is made from the tensors.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "OFT")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "OFT")
    modules, rest = modules_of(ledger, _SLOTS)
    cayley, note = _cayley_map(config, str(tuned.path))
    add_modules_on_base(ledger, modules, partial(_rotated, config, cayley, str(tuned.path)), split=split, note=note)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _cayley_map(config: Mapping[str, Any], where: str) -> tuple[CayleyMap, str]:
    """From the config to the map, and what is to be said about it.

    PEFT sums terms − 1 powers, the last of them once; up to 0.17 it counted the last one twice. Its
    configs carry a version since 0.18, so one without is older.
    """
    if not flag(config, "use_cayley_neumann", where):
        return CayleyMap(), ""
    terms = count(config, "num_cayley_neumann_terms", where)
    if terms > _MOST_TERMS:
        raise SourceError(f"{where}: num_cayley_neumann_terms = {terms} is not believable; mend adapter_config.json")
    if terms <= 2:
        return CayleyMap(powers=terms - 1), ""
    if _before_0_18(config.get("peft_version"), where):
        return CayleyMap(powers=terms - 1), "by the truncated Neumann series of PEFT before 0.18"
    return CayleyMap(powers=max(terms - 1, 3), halved=True), ""


def _before_0_18(version: object, where: str) -> bool:
    if version is None:
        return True
    numbers = str(version).split("@")[0].split(".")[:2]
    if len(numbers) < 2 or not all(part.isdecimal() for part in numbers):
        raise SourceError(f"{where}: peft_version = {version!r} is no version; mend adapter_config.json")
    return (int(numbers[0]), int(numbers[1])) < (0, 18)


def _rotated(
    config: Mapping[str, Any], cayley: CayleyMap, where: str, module: str, slots: Slots, base: TensorRef
) -> Rotated | str:
    """The rotation of one module, or why there is none."""
    if len(slots) != 1:
        return f"{module} has both oft_R and oft_embedding_R in {where}"
    slot, angles = next(iter(slots.items()))
    why = unusable(slots, [slot])
    if why:
        return why
    block = (1 + math.isqrt(1 + 8 * angles.shape[-1])) // 2 if len(angles.shape) == 2 else 0
    if block < 1 or block * (block - 1) // 2 != angles.shape[1]:
        return f"{slot} {list(angles.shape)} of {module} holds no rows of a triangle's entries"
    shared = flag(config, "block_share", where)
    blocks = base.shape[1] // block
    if base.shape[1] % block or angles.shape[0] != (1 if shared else blocks):
        return (
            f"{slot} {list(angles.shape)} of {module} (block_share: {shared}) does not turn {base.shape[1]} inputs "
            f"in blocks of {block}"
        )
    why = _contradicted(config, base.shape[1], block)
    if why:
        return f"{why} for {module}, the tensors in {where} have blocks of {block}"
    if flag(config, "coft", where):
        # Each block may turn by eps/√n; PEFT takes the root in float32.
        cayley = CayleyMap(cayley.powers, cayley.halved, real(config, "eps", where) / math.sqrt(angles.shape[0]))
    return Rotated(base, angles, block, cayley, embedding=slot == "oft_embedding_R")


def _contradicted(config: Mapping[str, Any], inputs: int, block: int) -> str:
    """What the config says about the blocks if it is not what the tensors say.

    PEFT replaces a size that does not divide the inputs by one that does, so only one that does counts.
    """
    for key, value in (("oft_block_size", block), ("r", inputs // block)):
        said = config.get(key)
        if isinstance(said, int) and said > 0 and inputs % said == 0 and said != value:
            return f"the config says {key} = {said}"
    return ""
