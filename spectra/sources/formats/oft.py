"""OFT: W₀ is turned by a block-diagonal rotation of its inputs, ΔW = W₀(Rᵀ − I) (Qiu et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

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
    def rank(self) -> int:
        """A skew-symmetric block of odd size has no full rank, and R − I has no more than Q."""
        blocks = self.shape[1] // self.block
        return min(self.shape[0], blocks * (self.block - self.block % 2))

    def from_base(self, base: Tensor) -> Dense:
        """R − I from Q without forming R, then the blocks of W₀ times those of R − I."""
        angles = self.angles.read_float64(str(base.device))
        turn = rotation_minus_identity(_skew(angles, self.block), self.cayley)
        return Dense(times_blocks(base, turn if self.embedding else turn.mT))


def times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """matrix (out, in) times the block-diagonal matrix of the blocks (n, b, b), or of one block repeated."""
    size = blocks.shape[-1]
    cut = matrix.reshape(matrix.shape[0], -1, size).transpose(0, 1)
    return (cut @ blocks).transpose(0, 1).reshape(matrix.shape)


def rotation_minus_identity(skew: Tensor, cayley: CayleyMap) -> Tensor:
    """R − I for each skew-symmetric Q (n, b, b).

    Exactly, (I − Q)(I + Q)⁻¹ − I = −2Q(I + Q)⁻¹; or the first powers of (I + Q)(I − Q)⁻¹ − I = 2Q + 2Q² + ….
    """
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
    """The skew-symmetric blocks (n, b, b) with these entries (n, b(b − 1)/2) above the diagonal, row by row."""
    rows, columns = torch.triu_indices(block, block, 1, device=angles.device)
    upper = angles.new_zeros(angles.shape[0], block, block)
    upper[:, rows, columns] = angles
    return upper - upper.mT


def read(ledger: Ledger) -> None:
    """Enter the rotation of every module.

    Raises:
        SourceError: the config does not say how R is made from the tensors.
    """
    modules = ledger.modules(slot_pattern("oft_R|oft_embedding_R"))
    cayley, note = _cayley_map(ledger.config)
    add_modules_on_base(ledger, modules, partial(_rotated, ledger.config, cayley), note=note)


def _cayley_map(config: Config) -> tuple[CayleyMap, str]:
    """From the config to the map, and what is to be said about it.

    PEFT sums terms − 1 powers, the last of them once; up to 0.17 it counted the last one twice. Its
    configs carry a version since 0.18, so one without is older.
    """
    if not config.flag("use_cayley_neumann"):
        return CayleyMap(), ""
    terms = config.count("num_cayley_neumann_terms")
    if terms > _MOST_TERMS:
        raise SourceError(
            f"{config.where}: num_cayley_neumann_terms = {terms} is not believable; mend adapter_config.json"
        )
    if terms <= 2:
        return CayleyMap(powers=terms - 1), ""
    if _before_0_18(config):
        return CayleyMap(powers=terms - 1), "by the truncated Neumann series of PEFT before 0.18"
    return CayleyMap(powers=max(terms - 1, 3), halved=True), ""


def _before_0_18(config: Config) -> bool:
    version = config.get("peft_version")
    if version is None:
        return True
    numbers = str(version).split("@")[0].split(".")[:2]
    if len(numbers) < 2 or not all(part.isdecimal() for part in numbers):
        raise SourceError(f"{config.where}: peft_version = {version!r} is no version; mend adapter_config.json")
    return (int(numbers[0]), int(numbers[1])) < (0, 18)


def _rotated(config: Config, cayley: CayleyMap, module: str, slots: Slots, base: TensorRef) -> Rotated:
    """The rotation of one module, whose blocks must be those of the config and fit the base's inputs."""
    if len(slots) != 1:
        raise Refusal(f"{module} has both oft_R and oft_embedding_R in {config.where}")
    (slot,) = slots
    (angles,) = slots.real(slot)
    block = (1 + math.isqrt(1 + 8 * angles.shape[-1])) // 2 if len(angles.shape) == 2 else 0
    if block < 1 or block * (block - 1) // 2 != angles.shape[1]:
        raise Refusal(f"{slot} {list(angles.shape)} of {module} holds no rows of a triangle's entries")
    inputs, shared = base.shape[1], config.flag("block_share")
    if inputs % block or angles.shape[0] != (1 if shared else inputs // block):
        raise Refusal(
            f"{slot} {list(angles.shape)} of {module} (block_share: {shared}) does not turn {inputs} inputs "
            f"in blocks of {block}"
        )
    _check_blocks(config, module, inputs, block)
    if config.flag("coft"):
        # Each block may turn by eps/√n; PEFT takes the root in float32.
        cayley = replace(cayley, radius=config.real("eps") / math.sqrt(angles.shape[0]))
    return Rotated(base, angles, block, cayley, embedding=slot == "oft_embedding_R")


def _check_blocks(config: Config, module: str, inputs: int, block: int) -> None:
    """Refuse tensors that are not what the config says about the blocks.

    PEFT replaces a size that does not divide the inputs by one that does, so only one that does counts.
    """
    for key, value in (("oft_block_size", block), ("r", inputs // block)):
        said = config.get(key)
        if isinstance(said, int) and said > 0 and inputs % said == 0 and said != value:
            raise Refusal(
                f"the config says {key} = {said} for {module}, the tensors in {config.where} have blocks of {block}"
            )
