"""Super-Tuning and Supra: chosen entries of the weight change, and a LoRA may be added (arXiv 2607.09287)."""

from __future__ import annotations

from dataclasses import dataclass

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

_LORA = ("supertuning_lora_A", "supertuning_lora_B")
_SLOTS = slot_pattern("|".join(("supertuning_indices", "supertuning_values", *_LORA)))


@dataclass(frozen=True)
class SparsePlusLowRank(FromTensors):
    """ΔW = values at their places, added up where a place comes twice, + s·B·A.

    Attributes:
        shape: (out, in).
        places: flat positions in row-major order, integers.
        values: as many numbers.
        factors: (B, A), or None.
        scale: s = α/r.
    """

    shape: tuple[int, int]
    places: TensorRef
    values: TensorRef
    factors: tuple[TensorRef, TensorRef] | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """No more than there are places, and r."""
        return min(self.places.numel + (self.factors[1].shape[0] if self.factors else 0), *self.shape)

    def read(self, device: str = "cpu") -> Dense:
        """Scatter, then add.

        Raises:
            SourceError: a place lies outside the weight.
        """
        places = self.places.read(device).to(torch.int64)
        out, inputs = self.shape
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= out * inputs):
            raise SourceError(f"{self.places.name} in {self.places.path}: a place lies outside of {out} × {inputs}")
        flat = torch.zeros(out * inputs, dtype=torch.float64, device=device)
        delta = flat.scatter_add(0, places, self.values.read_float64(device)).reshape(self.shape)
        if self.factors:
            left, right = (ref.read_float64(device) for ref in self.factors)
            delta = delta + self.scale * left @ right
        return Dense(delta)


def read(ledger: Ledger) -> None:
    """Enter the places, values and factors of every module."""

    def build(module: str, slots: Slots, base: TensorRef) -> SparsePlusLowRank:
        with_lora = _has_lora(ledger, module, slots)
        slots.real("supertuning_values", *(_LORA if with_lora else ()))
        places, values = slots.get("supertuning_indices"), slots["supertuning_values"]
        integers = places is not None and places.dtype in ("I32", "I64") and len(places.shape) == 1
        if places is None or not integers or places.shape != values.shape:
            given = f"{list(places.shape)} of {places.dtype}" if places else "missing"
            raise Refusal(f"supertuning_indices of {module} are {given}, for values {list(values.shape)}")
        shape = (base.shape[0], base.shape[1])
        if not with_lora:
            return SparsePlusLowRank(shape, places, values)
        r = ledger.config.count("r")
        right, left = (slots[name] for name in _LORA)
        if right.shape != (r, shape[1]) or left.shape != (shape[0], r):
            shapes = f"{list(left.shape)} and {list(right.shape)}"
            raise Refusal(f"the factors {shapes} of {module} do not fit r = {r} and {list(shape)}")
        return SparsePlusLowRank(shape, places, values, (left, right), ledger.config.real("lora_alpha") / r)

    add_modules_on_base(ledger, ledger.modules(_SLOTS), build)


def _has_lora(ledger: Ledger, module: str, slots: Slots) -> bool:
    """Whether the config adds a LoRA to the chosen entries, which must have been saved."""
    if "supertuning_indices" not in slots and ledger.config.get("save_precomputed_indices") is False:
        raise Refusal(
            f"the positions of {module} were not saved (save_precomputed_indices is false), and ties leave them open"
        )
    with_lora = ledger.config.get("r") is not None
    if not with_lora and set(_LORA) & set(slots):
        raise Refusal(f"the config says that {module} has no LoRA (r is null), and {ledger.where} holds one")
    return with_lora
