"""LoRA initialisations that take something out of the base: what was taken, from the original weights.

PiSSA, OLoRA and KaSA move a part M of W into the adapter, or drop it, and train on W − M. Their factors
are then relative to W − M; relative to the original weights ΔW = s·B·A − M, where M follows from W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import OnBase, Update, svd_bytes
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["pissa", "olora", "kasa"]


@dataclass(frozen=True)
class FromOriginal(OnBase):
    """ΔW = V − M(W), as one pair of factors.

    Attributes:
        update: V = s·B·A, relative to the residual base; factored.
        method: which part of W is M: "pissa" the r leading singular triplets (Meng et al. 2024),
            "olora" s times the first r columns and rows of W = QR (Büyükakyüz 2024; the s is PEFT's),
            "kasa" the r last singular triplets (Wang et al. 2024).
        width: r.
        scale: s.
    """

    factored = True
    update: Update
    method: Method
    width: int
    scale: float

    @property
    def rank(self) -> int:
        """At most r more than that of V."""
        return min(self.update.rank + self.width, *self.shape)

    @property
    def reading_bytes(self) -> int:
        """W in float64, and what decomposing it takes."""
        return svd_bytes(*self.shape)

    def from_base(self, base: Tensor) -> LowRank:
        """The factors in float64; PEFT decomposes W in float32, so its own residual differs by about 1e-7·‖W‖."""
        form = self.update.read(str(base.device))
        assert isinstance(form, LowRank)
        left, right = removed(base, self.method, self.width)
        left = left * self.scale if self.method == "olora" else left
        return LowRank(torch.cat([form.left, -left], 1), torch.cat([form.right, right], 0))


def removed(weight: Tensor, method: Method, width: int) -> tuple[Tensor, Tensor]:
    """The two factors of M, (out, r) and (r, in), for s = 1.

    Example:
        >>> import torch
        >>> left, right = removed(torch.diag(torch.tensor([3.0, 2.0, 1.0])), "kasa", 1)
        >>> (left @ right).diagonal().tolist()
        [0.0, 0.0, 1.0]
    """
    if method == "olora":
        Q, R = torch.linalg.qr(weight)
        return Q[:, :width], R[:width]
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    taken = slice(0, width) if method == "pissa" else slice(len(S) - width, len(S))
    return U[:, taken] * S[taken], Vh[taken]
