"""Uni-LoRA: both factors of every module are entries of one short vector, scaled (Li et al. 2025, §3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.deltas.forms import LowRank
from spectra.deltas.source import Source
from spectra.errors import SourceError, UnsupportedFormatError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules,
    add_rest,
    config_of,
    count,
    modules_of,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "unilora"
_SLOTS = slot_pattern("unilora_(?:indices|scales)_[AB]")
_VECTOR = ".unilora_theta_d"


@dataclass(frozen=True)
class Entries:
    """A matrix of scaled entries of a shared vector: M_ij = scales_ij · θ[places_ij]."""

    vector: TensorRef
    places: TensorRef
    scales: TensorRef

    def read(self, device: str) -> Tensor:
        """The matrix in float64.

        Raises:
            SourceError: a place lies outside of the vector.
        """
        import torch

        vector, places = self.vector.read_float64(device), self.places.read(device).to(torch.int64)
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= len(vector)):
            raise SourceError(
                f"{self.places.name} in {self.places.path}: a place lies outside of the vector of {len(vector)}"
            )
        return vector[places] * self.scales.read_float64(device)


@dataclass(frozen=True)
class SharedEntries:
    """ΔW = B·A, both made of the shared vector's entries."""

    left: Entries
    right: Entries

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The vector, the places and the scales."""
        sides = (self.left, self.right)
        return (self.left.vector, *(ref for side in sides for ref in (side.places, side.scales)))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.left.places.shape[0], self.right.places.shape[1])

    @property
    def rank(self) -> int:
        """r."""
        return min(self.left.places.shape[1], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """Both factors in float64."""
        return LowRank(self.left.read(device), self.right.read(device))


def open_unilora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the shared vector and every module's places in it.

    Raises:
        UnsupportedFormatError: the places were not saved; PEFT draws them in the order of the model's modules.
        SourceError: the config is missing, or the vector is no vector of real numbers.
    """
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "Uni-LoRA")
    modules, rest = modules_of(ledger, _SLOTS)
    vectors = [name for name in rest if _VECTOR in name]
    vector = tuned.tensors[vectors[0]] if len(vectors) == 1 else None
    if vector is None or len(vector.shape) != 1 or not vector.is_float:
        raise SourceError(f"{tuned.path} does not hold one vector unilora_theta_d of real numbers; save it again")
    if not ledger.deltas and not modules:
        raise UnsupportedFormatError(
            f"{tuned.path} holds a Uni-LoRA without its places (save_indices was false): they were drawn in the order "
            "of the model's modules, which no file holds; save it again with save_indices=True"
        )
    add_modules(ledger, modules, partial(_shared, config, vector, str(tuned.path)), split=split)
    add_rest(ledger, [name for name in rest if name not in vectors], split=split)
    return ledger.source(KIND)


def _shared(config: Mapping[str, Any], vector: TensorRef, where: str, module: str, slots: Slots) -> SharedEntries | str:
    """The factors of one module, or why there are none."""
    why = unusable(slots, ("unilora_scales_A", "unilora_scales_B"))
    if why:
        return why
    r = count(config, "r", where)
    sides = []
    for side, axis in (("B", 1), ("A", 0)):
        places, scales = slots.get(f"unilora_indices_{side}"), slots[f"unilora_scales_{side}"]
        if places is None or places.dtype not in ("I32", "I64") or len(places.shape) != 2:
            return f"unilora_indices_{side} of {module} is missing in {where}, or no matrix of integers"
        if places.shape != scales.shape or places.shape[axis] != r:
            shapes = f"{list(places.shape)} and {list(scales.shape)}"
            return f"the config says r = {r} for {module}, the places and scales of {side} in {where} are {shapes}"
        sides.append(Entries(vector, places, scales))
    return SharedEntries(sides[0], sides[1])
