"""C3A: ΔW is a grid of circulant blocks, each given by one kernel (Chen et al. 2024, §3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from spectra.deltas.forms import Dense
from spectra.deltas.source import Source
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules,
    add_rest,
    modules_of,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import override

KIND = "c3a"
_SLOTS = slot_pattern("c3a_kernel")


@dataclass(frozen=True)
class CirculantBlocks:
    """Block (i, j) of ΔW has the entry kernels[i, j, (q − p) mod b] / in at row p and column q.

    Attributes:
        kernels: (out/b, in/b, b).
    """

    kernels: TensorRef

    @property
    def factored(self) -> bool:
        """False."""
        return False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The kernels."""
        return (self.kernels,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns, b = self.kernels.shape
        return (rows * b, columns * b)

    @property
    def rank(self) -> int:
        """Full."""
        return min(self.shape)

    @property
    def reading_bytes(self) -> int:
        """The blocks, in the matrix's order, and scaled."""
        return 24 * self.shape[0] * self.shape[1]

    def read(self, device: str = "cpu") -> Dense:
        """The matrix in float64."""
        import torch

        kernels = self.kernels.read_float64(device)
        steps = torch.arange(kernels.shape[2], device=device)
        blocks = kernels[:, :, (steps[None, :] - steps[:, None]) % kernels.shape[2]]  # i, j, p, q
        return Dense(blocks.permute(0, 2, 1, 3).reshape(self.shape) / self.shape[1])


def open_c3a(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module's kernels.

    Raises:
        SourceError: a pattern of the config is unusable.
    """
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules(ledger, modules, partial(_update, tuned), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _update(tuned: Folder, module: str, slots: Slots) -> CirculantBlocks | str:
    why = unusable(slots, ("c3a_kernel",))
    if why:
        return why
    kernels = slots["c3a_kernel"]
    if len(kernels.shape) != 3 or not kernels.numel:
        return f"c3a_kernel {list(kernels.shape)} is not (out/b, in/b, b)"
    config = tuned.adapter_config or {}
    expected = override(config, "block_size_pattern", module, config.get("block_size"), str(tuned.path))
    if expected not in (None, kernels.shape[2]):
        return f"the config says block_size = {expected!r} for {module}, the kernels have {kernels.shape[2]}"
    return CirculantBlocks(kernels)
