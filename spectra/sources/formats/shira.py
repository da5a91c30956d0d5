"""SHiRA: ΔW is sparse, its entries stored with their positions (Bhardwaj et al. 2024, §3)."""

from __future__ import annotations

from dataclasses import dataclass

from spectra.deltas.forms import Dense
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

KIND = "shira"
_SLOTS = slot_pattern("shira_weight|shira_indices")
_INDEX_TYPES = ("I32", "I64", "F32")  # PEFT stores whole numbers as float32 on Windows


@dataclass(frozen=True)
class SparseEntries:
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
    def factored(self) -> bool:
        """False."""
        return False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The entries and their positions."""
        return (self.entries, self.positions)

    @property
    def rank(self) -> int:
        """The number of entries, at most min(out, in)."""
        return min(self.entries.numel, *self.shape)

    def read(self, device: str = "cpu") -> Dense:
        """The matrix in float64.

        Raises:
            SourceError: a position lies outside the weight.
        """
        import torch

        rows, columns = self.positions.read(device).to(torch.long)
        out, inside = self.shape
        if bool(((rows < 0) | (rows >= out) | (columns < 0) | (columns >= inside)).any()):
            raise SourceError(f"{self.positions.name} in {self.positions.path} points outside {list(self.shape)}")
        matrix = torch.zeros(self.shape, dtype=torch.float64, device=device)
        return Dense(matrix.index_put((rows, columns), self.entries.read_float64(device), accumulate=True))


def open_shira(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module's entries.

    Raises:
        BaseRequiredError: there is no base; the file does not hold the shapes of the weights.
    """
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    need_base(ledger, "SHiRA", "needs the shapes of the weights, which its file does not hold")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, _update, split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _update(module: str, slots: Slots, base: TensorRef) -> SparseEntries | str:
    why = unusable(slots, ("shira_weight",))
    if why or "shira_indices" not in slots:
        return why or f"shira_indices of {module} is missing"
    entries, positions = slots["shira_weight"], slots["shira_indices"]
    if positions.dtype not in _INDEX_TYPES:
        return f"shira_indices is stored as {positions.dtype}, not as positions"
    if len(entries.shape) != 1 or positions.shape != (2, entries.numel):
        return (
            f"shira_indices {list(positions.shape)} are not two numbers for each of shira_weight {list(entries.shape)}"
        )
    return SparseEntries(entries, positions, (base.shape[0], base.shape[1]))
