"""GLoRA: every weight is scaled and shifted, ΔW = W₀ ∘ A + B (Chavan et al. 2023)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_KEYS = {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",), "none": ("zeros",)}
_BIAS_ONLY = re.compile(r".+\.glora_[CDE]\.(?:Xd|Xu|X|zeros)")


@dataclass(frozen=True)
class ScaledShifted(OnBase):
    """ΔW = W₀ ∘ A + B, each of A and B a low-rank matrix, a column, one number, or a whole matrix.

    Attributes:
        factor: A, as one tensor that broadcasts to (out, in) or as two factors.
        shift: B, likewise.
    """

    copies = 5
    factor: tuple[TensorRef, ...]
    shift: tuple[TensorRef, ...]

    def from_base(self, base: Tensor) -> Dense:
        """Entry by entry."""
        factor, shift = (_value(refs, str(base.device)) for refs in (self.factor, self.shift))
        return Dense(base * factor + shift)


def _value(refs: tuple[TensorRef, ...], device: str) -> Tensor:
    tensors = [ref.read_float64(device) for ref in refs]
    return tensors[0] if len(tensors) == 1 else tensors[0] @ tensors[1]


def read(ledger: Ledger) -> None:
    """Enter paths A and B of every module; C, D and E change its bias only."""
    r, path = ledger.config.count("r"), str(ledger.config.get("config_A_B"))

    def build(module: str, slots: Slots, base: TensorRef) -> ScaledShifted:
        if path not in _KEYS:
            raise Refusal(f"config_A_B = {path!r} in {ledger.where} is none of {', '.join(_KEYS)}")
        needed = [f"glora_{letter}.{key}" for letter in "AB" for key in _KEYS[path]]
        refs = slots.real(*needed)
        if set(slots) != set(needed):
            raise Refusal(f"{module} has {', '.join(sorted(slots))}, not what config_A_B = {path!r} has")
        shapes = _shapes(path, r, base)
        if [ref.shape for ref in refs] != [*shapes, *shapes]:
            listed = ", ".join(f"{name} {list(slots[name].shape)}" for name in needed)
            raise Refusal(f"{listed} of {module} do not fit r = {r} and the base weight {list(base.shape)}")
        return ScaledShifted(base, refs[: len(shapes)], refs[len(shapes) :])

    add_modules_on_base(ledger, ledger.modules(r"(?P<slot>glora_[AB]\.(?:Xd|Xu|X|zeros))"), build)
    for name in filter(_BIAS_ONLY.fullmatch, ledger.tuned.tensors):
        ledger.skip(name, "changes the module's bias, not its matrix")


def _shapes(path: str, r: int, base: TensorRef) -> tuple[tuple[int, ...], ...]:
    """What the tensors of a path of each kind must be."""
    out, inputs = base.shape
    return {
        "lora": ((out, r), (r, inputs)), "vector": ((out, 1),), "constant": ((1,),), "none": ((out, inputs),),
    }[path]  # fmt: skip
