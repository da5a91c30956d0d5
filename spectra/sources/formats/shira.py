"""SHiRA: ΔW is sparse, its entries stored with their positions (Bhardwaj et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

_INDEX_TYPES = ("I32", "I64", "F32")  # PEFT stores whole numbers as float32 on Windows


@dataclass(frozen=True)
class SparseEntries(FromTensors):
    """ΔW is 0 but for the stored entries; entries at the same position add up.

    Attributes:
        entries: (n,).
        positions: (2, n), rows and columns.
        shape: (out, in).
    """

    entries: TensorRef
    positions: TensorRef
    shape: tuple[int, int]

    @property
    def rank(self) -> int:
        """At most the number of entries."""
        return min(self.entries.numel, *self.shape)

    def read(self, device: str = "cpu") -> Dense:
        """The matrix in float64.

        Raises:
            SourceError: a position lies outside the weight.
        """
        rows, columns = self.positions.read(device).to(torch.long)
        out, inside = self.shape
        if bool(((rows < 0) | (rows >= out) | (columns < 0) | (columns >= inside)).any()):
            raise SourceError(f"{self.positions.name} in {self.positions.path} points outside {list(self.shape)}")
        matrix = torch.zeros(self.shape, dtype=torch.float64, device=device)
        return Dense(matrix.index_put((rows, columns), self.entries.read_float64(device), accumulate=True))


def read(ledger: Ledger) -> None:
    """Enter every module's entries."""
    add_modules_on_base(ledger, ledger.modules(slot_pattern("shira_weight|shira_indices")), _sparse)


def _sparse(module: str, slots: Slots, base: TensorRef) -> SparseEntries:
    """The entries of one module, with a position for each."""
    (entries,) = slots.real("shira_weight")
    positions = slots.get("shira_indices")
    if positions is None:
        raise Refusal(f"shira_indices of {module} is missing")
    if positions.dtype not in _INDEX_TYPES:
        raise Refusal(f"shira_indices is stored as {positions.dtype}, not as positions")
    if len(entries.shape) != 1 or positions.shape != (2, entries.numel):
        raise Refusal(
            f"shira_indices {list(positions.shape)} are not two numbers for each of shira_weight {list(entries.shape)}"
        )
    return SparseEntries(entries, positions, (base.shape[0], base.shape[1]))
