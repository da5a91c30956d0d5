"""DEFT, and PaRa: a subspace of the outputs is taken out of W₀ and written anew, an update of rank r."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from spectra.deltas.forms import LowRank
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    config_of,
    count,
    flag,
    modules_of,
    need_base,
    real,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

KIND = "deft"
_SLOTS = slot_pattern("deft_P|deft_R")


@dataclass(frozen=True)
class Replaced:
    """ΔW = Q(s·R − VᵀW₀): what V sees of W₀ goes, s·R comes.

    "relu": Q = P and V = max(P, 0). "qr": Q = V, the Q of P's QR decomposition by Householder
    reflections, whose signs matter, since R was trained for them. PaRa has no R.

    Attributes:
        base: W₀ (out, in).
        directions: P (out, r).
        written: R (r, in), or None.
        scale: s = α/r, or 1.
        orthonormal: whether "qr".
    """

    base: TensorRef
    directions: TensorRef
    written: TensorRef | None
    scale: float
    orthonormal: bool

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the factors."""
        return (self.base, self.directions, *((self.written,) if self.written else ()))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.base.shape[0], self.base.shape[1])

    @property
    def rank(self) -> int:
        """r."""
        return min(self.directions.shape[1], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """Left Q, right s·R − VᵀW₀."""
        import torch

        base, directions = self.base.read_float64(device), self.directions.read_float64(device)
        left = torch.linalg.qr(directions).Q if self.orthonormal else directions
        seen = left if self.orthonormal else directions.clamp(min=0)
        right = -(seen.T @ base)
        if self.written is not None:
            right += self.scale * self.written.read_float64(device)
        return LowRank(left, right, float(base.norm()))


def open_deft(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the factors of every module.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is missing, or does not say how the factors are used.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "DEFT")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "DEFT")
    method = config.get("decomposition_method")
    if method not in ("relu", "qr"):
        raise SourceError(f"{tuned.path}: decomposition_method = {method!r} is neither relu nor qr; mend the config")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_replaced, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _replaced(config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef) -> Replaced | str:
    """The factors of one module, or why there are none."""
    removed_only = flag(config, "para", where)
    if removed_only and "deft_R" in slots:
        return f"the config says that {module} has no deft_R (para), and {where} holds one"
    why = unusable(slots, ["deft_P"] if removed_only else ["deft_P", "deft_R"])
    if why:
        return why
    directions, written = slots["deft_P"], slots.get("deft_R")
    r = min(count(config, "r", where), base.shape[0])
    if directions.shape != (base.shape[0], r) or (written and written.shape != (r, base.shape[1])):
        shapes = " and ".join(f"{name} {list(ref.shape)}" for name, ref in slots.items())
        return f"{shapes} of {module} do not fit r = {r} and the base weight {list(base.shape)}"
    scale = 1.0 if config.get("alpha") in (None, 0) else real(config, "alpha", where) / r
    return Replaced(base, directions, written, scale, config["decomposition_method"] == "qr")
