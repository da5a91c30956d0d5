"""FRoD: modules of one role share a basis in which each is diagonal; the diagonal and a few places beside it change."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = ("frod_lambda_l", "frod_lambda_s_values")
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
_OF_A_ROLE = re.compile(rf"(?:.+\.)?(?P<slot>{'|'.join(_SHARED)})\.(?P<role>[^.]+)")
_ZERO = 1e-12  # PEFT takes a column of W₀V⁻ᵀ that is not longer for zero


@dataclass(frozen=True)
class SharedBasis(OnBase):
    """ΔW = U (S + diag(λ − λ₀)) Vᵀ, with W₀ = U diag(λ₀) Vᵀ and unit columns in U.

    Attributes:
        basis: V (in, in), of all modules of the role.
        diagonal: λ (in,).
        values: the entries of S.
        places: their rows and columns (2, n), integers.
        extent: the size that S has (2,), integers.
    """

    basis: TensorRef
    diagonal: TensorRef
    values: TensorRef
    places: TensorRef
    extent: TensorRef

    @property
    def reading_bytes(self) -> int:
        """V, its LU factors and S, (in, in), and W₀, U and ΔW."""
        return 8 * (4 * self.basis.numel + 4 * self.base.numel)

    def from_base(self, base: Tensor) -> Dense:
        """U and λ₀ from W₀V⁻ᵀ, as PEFT finds them when it loads the adapter.

        Raises:
            SourceError: V cannot be inverted, or the places do not fit S.
        """
        device = str(base.device)
        basis = self.basis.read_float64(device)
        solved, failed = torch.linalg.solve_ex(basis, base.T)
        if int(failed):
            raise SourceError(f"{self.basis.name} in {self.basis.path} cannot be inverted")
        turned = solved.T
        lengths = turned.norm(dim=0)
        used = lengths > _ZERO
        unit = torch.where(used, turned / lengths, torch.zeros_like(turned))
        middle = self._sparse(device) + torch.diag(self.diagonal.read_float64(device) - lengths * used)
        return Dense(unit @ middle @ basis.T)

    def _sparse(self, device: str) -> Tensor:
        size, places = self.base.shape[1], self.places.read(device).to(torch.int64)
        if self.extent.read().tolist() != [size, size]:
            raise SourceError(f"{self.extent.name} in {self.extent.path} is not {size} × {size}")
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= size):
            raise SourceError(f"{self.places.name} in {self.places.path}: a place lies outside of {size} × {size}")
        sparse = torch.zeros(size, size, dtype=torch.float64, device=device)
        return sparse.index_put((places[0], places[1]), self.values.read_float64(device), accumulate=True)


def role_of(module: str) -> str:
    """What PEFT calls the modules that share a basis: the last two parts of the path.

    >>> role_of("model.layers.0.self_attn.q_proj"), role_of("encoder.layer.1.attention.output.dense")
    ('self_attn_q_proj', 'attention_output')
    """
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def read(ledger: Ledger) -> None:
    """Enter the diagonals of every module in the basis of its role."""
    bases = _bases(ledger)

    def build(module: str, slots: Slots, base: TensorRef) -> SharedBasis:
        role = role_of(module)
        shared = bases.get(role, Slots())
        if set(shared) != set(_SHARED):
            missing = f"{_SHARED[0]}.{role} and its places are not in {ledger.where}"
            raise Refusal(f"{missing} (save_projection), so {module} has no basis")
        diagonal, values = slots.real(*_NAMES)
        (basis,) = shared.real("frod_V")
        size, places = base.shape[1], shared["frod_s_indices"]
        if basis.shape != (size, size) or diagonal.shape != (size,):
            shapes = f"frod_V {list(basis.shape)} and {list(diagonal.shape)}"
            raise Refusal(f"{shapes} of {module} do not fit {size} inputs")
        if places.dtype not in ("I32", "I64") or len(values.shape) != 1 or places.shape != (2, values.shape[0]):
            placed = f"frod_s_indices {list(places.shape)} of {places.dtype}"
            raise Refusal(f"{placed} of {module} do not place {list(values.shape)}")
        return SharedBasis(base, basis, diagonal, values, places, shared["frod_s_size"])

    add_modules_on_base(ledger, ledger.modules(slot_pattern("|".join(_NAMES))), build)


def _bases(ledger: Ledger) -> dict[str, Slots]:
    """role → V and the places of S, which lie under `base_model` and not under a module."""
    bases: dict[str, Slots] = {}
    for name, ref in ledger.tuned.tensors.items():
        match = _OF_A_ROLE.fullmatch(name)
        if match:
            bases.setdefault(match["role"], Slots())[match["slot"]] = ref
    ledger.use(ref for shared in bases.values() for ref in shared.values())
    return bases
