"""Uni-LoRA: both factors of every module are entries of one short vector, scaled (Li et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError, UnsupportedFormatError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Entries(FromTensors):
    """A matrix of scaled entries of a shared vector: M_ij = scales_ij · θ[places_ij]."""

    vector: TensorRef
    places: TensorRef
    scales: TensorRef

    def read(self, device: str) -> Tensor:
        """The matrix in float64.

        Raises:
            SourceError: a place lies outside of the vector.
        """
        vector, places = self.vector.read_float64(device), self.places.read(device).to(torch.int64)
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= len(vector)):
            raise SourceError(
                f"{self.places.name} in {self.places.path}: a place lies outside of the vector of {len(vector)}"
            )
        return vector[places] * self.scales.read_float64(device)


@dataclass(frozen=True)
class SharedEntries(FromTensors):
    """ΔW = B·A, both made of the shared vector's entries."""

    factored = True
    left: Entries
    right: Entries

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.left.places.shape[0], self.right.places.shape[1])

    @property
    def rank(self) -> int:
        """At most r."""
        return min(self.left.places.shape[1], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """Both factors in float64."""
        return LowRank(self.left.read(device), self.right.read(device))


def read(ledger: Ledger) -> None:
    """Enter the shared vector's entries for every module.

    Raises:
        UnsupportedFormatError: the places were not saved; PEFT draws them in the order of the model's modules.
        SourceError: the vector is no vector of real numbers.
    """
    modules, vector = ledger.modules(slot_pattern("unilora_(?:indices|scales)_[AB]")), ledger.shared("unilora_theta_d")
    if vector is None or len(vector.shape) != 1 or not vector.is_float:
        raise SourceError(f"{ledger.where} does not hold one vector unilora_theta_d of real numbers; save it again")
    if not ledger.deltas and not modules:
        raise UnsupportedFormatError(
            f"{ledger.where} holds a Uni-LoRA without its places (save_indices was false): they were drawn in the "
            "order of the model's modules, which no file holds; save it again with save_indices=True"
        )

    def build(module: str, slots: Slots) -> SharedEntries:
        slots.real("unilora_scales_A", "unilora_scales_B")
        return SharedEntries(*(_entries(ledger, module, slots, vector, side) for side in "BA"))

    add_modules(ledger, modules, build)


def _entries(ledger: Ledger, module: str, slots: Slots, vector: TensorRef, side: str) -> Entries:
    """One factor of a module: B (out, r) or A (r, in)."""
    places, scales = slots.get(f"unilora_indices_{side}"), slots[f"unilora_scales_{side}"]
    if places is None or places.dtype not in ("I32", "I64") or len(places.shape) != 2:
        raise Refusal(f"unilora_indices_{side} of {module} is missing in {ledger.where}, or no matrix of integers")
    r = ledger.config.count("r")
    if places.shape != scales.shape or places.shape["AB".index(side)] != r:
        shapes = f"{list(places.shape)} and {list(scales.shape)}"
        raise Refusal(
            f"the config says r = {r} for {module}, the places and scales of {side} in {ledger.where} are {shapes}"
        )
    return Entries(vector, places, scales)
