"""Super-Tuning and Supra: chosen entries of the weight change, and a LoRA may be added (arXiv 2607.09287)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from spectra.deltas.forms import Dense
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
    modules_of,
    need_base,
    real,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

KIND = "supertuning"
_LORA = ("supertuning_lora_A", "supertuning_lora_B")
_SLOTS = slot_pattern("|".join(("supertuning_indices", "supertuning_values", *_LORA)))


@dataclass(frozen=True)
class SparsePlusLowRank:
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
    def factored(self) -> bool:
        """False."""
        return False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Places, values and factors."""
        return (self.places, self.values, *(self.factors or ()))

    @property
    def rank(self) -> int:
        """No more than there are places, and r."""
        return min(self.places.numel + (self.factors[1].shape[0] if self.factors else 0), *self.shape)

    def read(self, device: str = "cpu") -> Dense:
        """Scatter, then add.

        Raises:
            SourceError: a place lies outside the weight.
        """
        import torch

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


def open_supertuning(
    tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None
) -> Source:
    """Read places, values and factors of every module.

    Raises:
        BaseRequiredError: there is no base, whose shape the flat places refer to.
        SourceError: the config is missing, or a number in it is none.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "Super-Tuning", "is saved as flat positions in the base weight, whose shape they need")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "Super-Tuning")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_sparse, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _sparse(
    config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef
) -> SparsePlusLowRank | str:
    """The update of one module, or why there is none."""
    if "supertuning_indices" not in slots and config.get("save_precomputed_indices") is False:
        return f"the positions of {module} were not saved (save_precomputed_indices is false), and ties leave them open"
    with_lora = config.get("r") is not None
    if not with_lora and set(_LORA) & set(slots):
        return f"the config says that {module} has no LoRA (r is null), and {where} holds one"
    why = unusable(slots, ("supertuning_values", *(_LORA if with_lora else ())))
    if why:
        return why
    places, values = slots.get("supertuning_indices"), slots["supertuning_values"]
    if places is None or places.dtype not in ("I32", "I64") or len(places.shape) != 1 or places.shape != values.shape:
        found = f"{list(places.shape)} of {places.dtype}" if places else "missing"
        return f"supertuning_indices of {module} are {found}, for values {list(values.shape)}"
    shape = (base.shape[0], base.shape[1])
    if not with_lora:
        return SparsePlusLowRank(shape, places, values)
    r = count(config, "r", where)
    right, left = (slots[name] for name in _LORA)
    if right.shape != (r, shape[1]) or left.shape != (shape[0], r):
        return (
            f"the factors {list(left.shape)} and {list(right.shape)} of {module} do not fit r = {r} and {list(shape)}"
        )
    return SparsePlusLowRank(shape, places, values, (left, right), real(config, "lora_alpha", where) / r)
