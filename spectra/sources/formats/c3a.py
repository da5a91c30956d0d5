"""C3A: ΔW is a grid of circulant blocks, each given by one kernel (Chen et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import FromTensors
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.ledger import Ledger


@dataclass(frozen=True)
class CirculantBlocks(FromTensors):
    """Block (i, j) of ΔW has the entry kernels[i, j, (q − p) mod b] / in at row p and column q.

    Attributes:
        kernels: (out/b, in/b, b).
    """

    kernels: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns, b = self.kernels.shape
        return (rows * b, columns * b)

    @property
    def rank(self) -> int:
        """Circulant blocks can have full rank."""
        return min(self.shape)

    @property
    def reading_bytes(self) -> int:
        """The blocks, in the matrix's order, and scaled."""
        return 24 * self.shape[0] * self.shape[1]

    def read(self, device: str = "cpu") -> Dense:
        """The matrix in float64."""
        kernels = self.kernels.read_float64(device)
        steps = torch.arange(kernels.shape[2], device=device)
        blocks = kernels[:, :, (steps[None, :] - steps[:, None]) % kernels.shape[2]]  # i, j, p, q
        return Dense(blocks.permute(0, 2, 1, 3).reshape(self.shape) / self.shape[1])


def read(ledger: Ledger) -> None:
    """Enter the kernels of every module."""

    def build(module: str, slots: Slots) -> CirculantBlocks:
        (kernels,) = slots.real("c3a_kernel")
        if len(kernels.shape) != 3 or not kernels.numel:
            raise Refusal(f"c3a_kernel {list(kernels.shape)} is not (out/b, in/b, b)")
        size, config = kernels.shape[2], ledger.config
        expected = config.override("block_size_pattern", module, config.get("block_size"))
        if expected not in (None, size):
            raise Refusal(f"the config says block_size = {expected!r} for {module}, the kernels have {size}")
        return CirculantBlocks(kernels)

    add_modules(ledger, ledger.modules(slot_pattern("c3a_kernel")), build)
