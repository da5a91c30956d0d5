"""HRA: the inputs are reflected r times, ΔW = W₀(H − I) of rank r (Yuan et al. 2024, eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.deltas.forms import LowRank
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
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "hra"
_SLOTS = slot_pattern("hra_u")
_DEPENDENT = 1e-12  # what is left of a unit vector that lies in the span of the ones before it


@dataclass(frozen=True)
class Reflected:
    """ΔW = W₀(H − I), H = (I − 2u₁u₁ᵀ) ⋯ (I − 2u_r u_rᵀ), or H = I − 2QQᵀ with Q the Gram–Schmidt basis of the u.

    As factors: H − I = −2 V Uᵀ with vᵢ = (I − 2u₁u₁ᵀ) ⋯ (I − 2uᵢ₋₁uᵢ₋₁ᵀ) uᵢ.

    Attributes:
        base: W₀ (out, in).
        vectors: the u as columns (in, r), of any length.
        orthogonalised: whether Gram–Schmidt comes first.
    """

    base: TensorRef
    vectors: TensorRef
    orthogonalised: bool

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the vectors."""
        return (self.base, self.vectors)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.base.shape[0], self.base.shape[1])

    @property
    def rank(self) -> int:
        """r."""
        return min(self.vectors.shape[1], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """Left −2W₀V, right Uᵀ."""
        base = self.base.read_float64(device)
        vectors = self.vectors.read_float64(device)
        unit = vectors / vectors.norm(dim=0)
        if self.orthogonalised:
            unit = self._basis(unit)
            moved = unit
        else:
            moved = _moved(unit)
        return LowRank(-2 * (base @ moved), unit.T, float(base.norm()))

    def _basis(self, unit: Tensor) -> Tensor:
        """The orthonormal basis of the vectors' span; H does not depend on which."""
        import torch

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


def open_hra(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the vectors of every module.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is missing, or r or apply_GS in it is no number or flag.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "HRA")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "HRA")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_reflected, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _reflected(config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef) -> Reflected | str:
    """The reflections of one module, or why there are none."""
    why = unusable(slots, ["hra_u"])
    if why:
        return why
    vectors = slots["hra_u"]
    if len(vectors.shape) != 2 or vectors.shape[0] != base.shape[1]:
        return f"hra_u {list(vectors.shape)} of {module} does not reflect the inputs of {list(base.shape)}"
    r = count(config, "r", where)
    if vectors.shape[1] != r:
        return f"the config says r = {r} for {module}, the vectors in {where} are {vectors.shape[1]}"
    return Reflected(base, vectors, flag(config, "apply_GS", where))
