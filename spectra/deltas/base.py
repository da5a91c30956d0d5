"""`BaseWeight`: where W₀ of an update is, turned and cut as the update is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BaseWeight:
    """The weight that an update changes, unread. Whatever needs W₀ asks here, and nowhere else.

    Attributes:
        name: the stored tensor's name in the base; a part of a fused or stacked weight has the whole's.
        ref: W₀ (out, in), Linear orientation, cut and permuted like the update.
        stored: the tensor as it lies in the file, of which `ref` is a view.
    """

    name: str
    ref: TensorRef
    stored: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.ref.shape

    @property
    def transposed(self) -> bool:
        """Whether the file holds (in, out), as Conv1D does."""
        return any(kind == "T" for kind, _ in self.ref.views)

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's kernel (kh, kw), which W₀'s columns count with the inputs; () for any other weight."""
        return self.stored.shape[2:] if len(self.stored.shape) > 3 or self._is_sequence_kernel else ()

    @property
    def _is_sequence_kernel(self) -> bool:
        return len(self.stored.shape) == 3 and any(kind == "reshape" for kind, _ in self.ref.views)

    def places(self) -> Tensor:
        """Where W₀'s entries lie in the stored tensor, as flat positions (out, in): what is needed to write it back.

        Example:
            >>> stored = TensorRef("", "c_attn.weight", "F32", (2, 3), "safetensors", (0, 0), stored=(2, 3))
            >>> BaseWeight("c_attn.weight", stored.T.rows(0, 2), stored).places().tolist()
            [[0, 3], [1, 4]]
        """
        read = self.ref.stored or self.ref.shape
        skipped = self.ref.offset - self.stored.offset
        first = skipped * self.stored.numel // self.stored.nbytes if skipped else 0
        return self.ref.view(torch.arange(first, first + math.prod(read)).reshape(read))

    def read(self, device: str = "cpu") -> Tensor:
        """W₀ in float64.

        Raises:
            SourceError: the file is gone, changed or broken.
        """
        return self.ref.read_float64(device)

    def norm(self, device: str = "cpu") -> float:
        """‖W₀‖_F."""
        return float(self.read(device).norm())
