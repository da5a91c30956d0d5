"""GLoRA: every weight is scaled and shifted, ΔW = W₀ ∘ A + B (Chavan et al. 2023, eq. 10)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.deltas.source import Source
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.pairing import unwrap
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    config_of,
    count,
    modules_of,
    need_base,
    refuse_options,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "glora"
_SLOTS = r"(?P<slot>glora_[AB]\.(?:Xd|Xu|X|zeros))"
_BIAS_ONLY = (".glora_C.", ".glora_D.", ".glora_E.")
_KEYS = {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",), "none": ("zeros",)}


@dataclass(frozen=True)
class ScaledShifted(OnBase):
    """ΔW = W₀ ∘ A + B, each of A and B a low-rank matrix, a column, one number, or a whole matrix.

    Attributes:
        base: W₀ (out, in).
        factor: A, as one tensor that broadcasts to (out, in) or as two factors.
        shift: B, likewise.
    """

    copies = 5
    factor: tuple[TensorRef, ...]
    shift: tuple[TensorRef, ...]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the paths' tensors."""
        return (self.base, *self.factor, *self.shift)

    def read(self, device: str = "cpu") -> Dense:
        """Entry by entry."""
        base = self.base.read_float64(device)
        factor, shift = (_value(refs, device) for refs in (self.factor, self.shift))
        return Dense(base * factor + shift, base_norm=float(base.norm()))


def _value(refs: tuple[TensorRef, ...], device: str) -> Tensor:
    read = [ref.read_float64(device) for ref in refs]
    return read[0] if len(read) == 1 else read[0] @ read[1]


def open_glora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read paths A and B of every module; C, D and E change its bias only.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is missing, or r in it is no number.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "GLoRA")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "GLoRA")
    path = str(config.get("config_A_B"))
    r = count(config, "r", tuned.path)
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_scaled_shifted, path, r, str(tuned.path)), split=split)
    of_biases = [name for name in rest if any(key in name for key in _BIAS_ONLY)]
    ledger.skipped.update(dict.fromkeys(map(unwrap, of_biases), "changes the module's bias, not its matrix"))
    add_rest(ledger, [name for name in rest if name not in of_biases], split=split)
    return ledger.source(KIND)


def _scaled_shifted(path: str, r: int, where: str, module: str, slots: Slots, base: TensorRef) -> ScaledShifted | str:
    """Paths A and B of one module, or why there are none."""
    if path not in _KEYS:
        return f"config_A_B = {path!r} in {where} is none of {', '.join(_KEYS)}"
    needed = [f"glora_{letter}.{key}" for letter in "AB" for key in _KEYS[path]]
    why = unusable(slots, needed)
    if why or set(slots) != set(needed):
        return why or f"{module} has {', '.join(sorted(slots))}, not what config_A_B = {path!r} has"
    out, inputs = base.shape
    shapes = {
        "lora": ((out, r), (r, inputs)), "vector": ((out, 1),), "constant": ((1,),), "none": ((out, inputs),),
    }[path]  # fmt: skip
    found = [slots[name].shape for name in needed]
    if found != [*shapes, *shapes]:
        listed = ", ".join(f"{name} {list(slots[name].shape)}" for name in needed)
        return f"{listed} of {module} do not fit r = {r} and the base weight {list(base.shape)}"
    half = len(needed) // 2
    return ScaledShifted(
        base, tuple(slots[name] for name in needed[:half]), tuple(slots[name] for name in needed[half:])
    )
