"""FRoD: modules of one role share a basis in which each is diagonal; the diagonal and a few places beside it change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

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
    modules_of,
    need_base,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "frod"
_NAMES = ("frod_lambda_l", "frod_lambda_s_values")
_SLOTS = slot_pattern("|".join(_NAMES))
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
_ZERO = 1e-12  # PEFT takes a column of W₀V⁻ᵀ that is not longer for zero


@dataclass(frozen=True)
class SharedBasis(OnBase):
    """ΔW = U (S + diag(λ − λ₀)) Vᵀ, with W₀ = U diag(λ₀) Vᵀ and unit columns in U.

    Attributes:
        base: W₀ (out, in).
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
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the adapter's tensors."""
        return (self.base, self.basis, self.diagonal, self.values, self.places, self.extent)

    @property
    def reading_bytes(self) -> int:
        """V, its LU factors and S, (in, in), and W₀, U and ΔW."""
        return 8 * (4 * self.basis.numel + 4 * self.base.numel)

    def read(self, device: str = "cpu") -> Dense:
        """U and λ₀ from W₀V⁻ᵀ, as PEFT finds them when it loads the adapter.

        Raises:
            SourceError: V cannot be inverted, or the places do not fit S.
        """
        import torch

        base, basis = self.base.read_float64(device), self.basis.read_float64(device)
        solved, failed = torch.linalg.solve_ex(basis, base.T)
        if int(failed):
            raise SourceError(f"{self.basis.name} in {self.basis.path} cannot be inverted")
        turned = solved.T
        lengths = turned.norm(dim=0)
        used = lengths > _ZERO
        unit = torch.where(used, turned / lengths, torch.zeros_like(turned))
        middle = self._sparse(device) + torch.diag(self.diagonal.read_float64(device) - lengths * used)
        return Dense(unit @ middle @ basis.T, base_norm=float(base.norm()))

    def _sparse(self, device: str) -> Tensor:
        import torch

        size, places = self.base.shape[1], self.places.read(device).to(torch.int64)
        if self.extent.read().tolist() != [size, size]:
            raise SourceError(f"{self.extent.name} in {self.extent.path} is not {size} × {size}")
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= size):
            raise SourceError(f"{self.places.name} in {self.places.path}: a place lies outside of {size} × {size}")
        sparse = torch.zeros(size, size, dtype=torch.float64, device=device)
        return sparse.index_put((places[0], places[1]), self.values.read_float64(device), accumulate=True)


def open_frod(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the diagonals of every module and the bases of every role.

    Raises:
        BaseRequiredError: there is no base.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "FRoD")
    refuse_options(ledger, heads, scale)
    modules, rest = modules_of(ledger, _SLOTS)
    shared = {name: tuned.tensors[name] for name in rest if name.split(".")[-2:-1] and name.split(".")[-2] in _SHARED}
    by_role = {".".join(name.split(".")[-2:]): ref for name, ref in shared.items()}
    add_modules_on_base(ledger, modules, partial(_in_basis, by_role, str(tuned.path)), split=split)
    add_rest(ledger, [name for name in rest if name not in shared], split=split)
    return ledger.source(KIND)


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


def _in_basis(
    by_role: Mapping[str, TensorRef], where: str, module: str, slots: Slots, base: TensorRef
) -> SharedBasis | str:
    """The diagonal and places of one module, or why there are none."""
    role = role_of(module)
    found = {name: by_role[f"{name}.{role}"] for name in _SHARED if f"{name}.{role}" in by_role}
    if set(found) != set(_SHARED):
        return f"{_SHARED[0]}.{role} and its places are not in {where} (save_projection), so {module} has no basis"
    why = unusable(slots, _NAMES) or unusable({"frod_V": found["frod_V"]}, ["frod_V"])
    if why:
        return why
    diagonal, values = (slots[name] for name in _NAMES)
    size, places = base.shape[1], found["frod_s_indices"]
    if found["frod_V"].shape != (size, size) or diagonal.shape != (size,):
        return f"frod_V {list(found['frod_V'].shape)} and {list(diagonal.shape)} of {module} do not fit {size} inputs"
    if places.dtype not in ("I32", "I64") or len(values.shape) != 1 or places.shape != (2, values.shape[0]):
        return f"frod_s_indices {list(places.shape)} of {places.dtype} of {module} do not place {list(values.shape)}"
    return SharedBasis(base, found["frod_V"], diagonal, values, places, found["frod_s_size"])
