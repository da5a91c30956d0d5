"""DoRA: the direction of W + V with a trained magnitude per row or column (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase, Update
from spectra.files.tensors import TensorRef

if TYPE_CHECKING:
    from torch import Tensor

Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Dora(OnBase):
    """ΔW = m ∘ (W + V) / ‖W + V‖ − W, of full rank although V is not.

    Attributes:
        update: V, what the factors give.
        magnitude: m, one entry per row or per column in any shape. With fewer entries than columns, as
            for a convolution (out, in·kh·kw), an entry is for that many columns that lie side by side.
        axis: "rows" for a magnitude per output; "columns" per input, as for embeddings (vocabulary, dim).
    """

    copies = 4
    update: Update
    magnitude: TensorRef
    axis: Axis = "rows"

    def from_base(self, base: Tensor) -> Dense:
        """Add, normalise, rescale and subtract in float64."""
        device = str(base.device)
        moved = base + self.update.read(device).to_dense()
        magnitude = self.magnitude.read_float64(device).reshape(-1)
        scaled = _rescaled(moved, magnitude) if self.axis == "rows" else _rescaled_columns(moved, magnitude)
        return Dense(scaled - base)


def _rescaled(matrix: Tensor, magnitude: Tensor) -> Tensor:
    return (magnitude / matrix.norm(dim=1))[:, None] * matrix


def _rescaled_columns(matrix: Tensor, magnitude: Tensor) -> Tensor:
    grouped = matrix.reshape(matrix.shape[0], magnitude.numel(), -1)
    norm = grouped.square().sum(dim=(0, 2)).sqrt()
    return ((magnitude / norm)[:, None] * grouped).reshape(matrix.shape)


def misfit(magnitude: TensorRef, shape: tuple[int, int], axis: Axis) -> str:
    """Why a magnitude cannot belong to a weight (out, in), or ""."""
    if not magnitude.is_float:
        return f"the DoRA magnitude is stored as {magnitude.dtype}, not as real numbers"
    entries = shape[0] if axis == "rows" else shape[1]
    fits = magnitude.numel == entries or (axis == "columns" and magnitude.numel and entries % magnitude.numel == 0)
    return "" if fits else f"the DoRA magnitude {list(magnitude.shape)} does not fit the update {list(shape)}"
