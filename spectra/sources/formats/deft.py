"""DEFT, and PaRa: a subspace of the outputs is taken out of W₀ and written anew, an update of rank r."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import OnBase
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Replaced(OnBase):
    """ΔW = Q(s·R − VᵀW₀): what V sees of W₀ goes, s·R comes.

    "relu": Q = P and V = max(P, 0). "qr": Q = V, the Q of P's QR decomposition by Householder
    reflections, whose signs matter, since R was trained for them. PaRa has no R.

    Attributes:
        directions: P (out, r).
        written: R (r, in), or None.
        scale: s = α/r, or 1.
        orthonormal: whether "qr".
    """

    factored = True
    copies = 1
    directions: TensorRef
    written: TensorRef | None
    scale: float
    orthonormal: bool

    @property
    def rank(self) -> int:
        """At most r, the width of Q."""
        return min(self.directions.shape[1], *self.shape)

    def from_base(self, base: Tensor) -> LowRank:
        """Left Q, right s·R − VᵀW₀."""
        directions = self.directions.read_float64(str(base.device))
        left = torch.linalg.qr(directions).Q if self.orthonormal else directions
        seen = left if self.orthonormal else directions.clamp(min=0)
        right = -(seen.T @ base)
        if self.written is not None:
            right += self.scale * self.written.read_float64(str(base.device))
        return LowRank(left, right)


def read(ledger: Ledger) -> None:
    """Enter the factors of every module.

    Raises:
        SourceError: the config does not say how the factors are used.
    """
    config = ledger.config
    method = config.get("decomposition_method")
    if method not in ("relu", "qr"):
        raise SourceError(f"{ledger.where}: decomposition_method = {method!r} is neither relu nor qr; mend the config")

    def build(module: str, slots: Slots, base: TensorRef) -> Replaced:
        removed_only = config.flag("para")
        if removed_only and "deft_R" in slots:
            raise Refusal(f"the config says that {module} has no deft_R (para), and {ledger.where} holds one")
        directions, *residual = slots.real("deft_P", *(() if removed_only else ("deft_R",)))
        written = residual[0] if residual else None
        r = min(config.count("r"), base.shape[0])
        if directions.shape != (base.shape[0], r) or (written and written.shape != (r, base.shape[1])):
            shapes = " and ".join(f"{name} {list(ref.shape)}" for name, ref in slots.items())
            raise Refusal(f"{shapes} of {module} do not fit r = {r} and the base weight {list(base.shape)}")
        scale = 1.0 if config.get("alpha") in (None, 0) else config.real("alpha") / r
        return Replaced(base, directions, written, scale, method == "qr")

    add_modules_on_base(ledger, ledger.modules(slot_pattern("deft_P|deft_R")), build)
