"""HRA: the inputs are reflected r times, ΔW = W₀(H − I) of rank r (Yuan et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import OnBase
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_DEPENDENT = 1e-12  # what is left of a unit vector that lies in the span of the ones before it


@dataclass(frozen=True)
class Reflected(OnBase):
    """ΔW = W₀(H − I), H = (I − 2u₁u₁ᵀ) ⋯ (I − 2u_r u_rᵀ), or H = I − 2QQᵀ with Q the Gram–Schmidt basis of the u.

    As factors: H − I = −2 V Uᵀ with vᵢ = (I − 2u₁u₁ᵀ) ⋯ (I − 2uᵢ₋₁uᵢ₋₁ᵀ) uᵢ.

    Attributes:
        vectors: the u as columns (in, r), of any length.
        orthogonalised: whether Gram–Schmidt comes first.
    """

    factored = True
    copies = 1
    vectors: TensorRef
    orthogonalised: bool

    @property
    def rank(self) -> int:
        """At most r."""
        return min(self.vectors.shape[1], *self.shape)

    def from_base(self, base: Tensor) -> LowRank:
        """Left −2W₀V, right Uᵀ."""
        vectors = self.vectors.read_float64(str(base.device))
        unit = vectors / vectors.norm(dim=0)
        if self.orthogonalised:
            unit = self._basis(unit)
        return LowRank(-2 * (base @ (unit if self.orthogonalised else _moved(unit))), unit.T)

    def _basis(self, unit: Tensor) -> Tensor:
        """The orthonormal basis of the vectors' span; H does not depend on which."""
        basis, triangle = torch.linalg.qr(unit)
        if unit.shape[1] > unit.shape[0] or float(triangle.diagonal().abs().min()) < _DEPENDENT:
            raise SourceError(
                f"{self.vectors.name} in {self.vectors.path}: the vectors are linearly dependent, so Gram–Schmidt "
                "(apply_GS) has no result"
            )
        return basis


def _moved(unit: Tensor) -> Tensor:
    """vᵢ = uᵢ − 2 Σ_{j<i} vⱼ (uⱼ·uᵢ)."""
    gram = unit.T @ unit
    moved = unit.clone()
    for i in range(1, unit.shape[1]):
        moved[:, i] -= 2 * (moved[:, :i] @ gram[:i, i])
    return moved


def read(ledger: Ledger) -> None:
    """Enter the reflections of every module."""

    def build(module: str, slots: Slots, base: TensorRef) -> Reflected:
        (vectors,) = slots.real("hra_u")
        if len(vectors.shape) != 2 or vectors.shape[0] != base.shape[1]:
            raise Refusal(f"hra_u {list(vectors.shape)} of {module} does not reflect the inputs of {list(base.shape)}")
        r = ledger.config.count("r")
        if vectors.shape[1] != r:
            raise Refusal(f"the config says r = {r} for {module}, the vectors in {ledger.where} are {vectors.shape[1]}")
        return Reflected(base, vectors, ledger.config.flag("apply_GS"))

    add_modules_on_base(ledger, ledger.modules(slot_pattern("hra_u")), build)
