"""GraLoRA: the weight in k × k blocks, each with a low-rank update of its own (Jung et al. 2025, eq. 5)."""

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
    add_modules,
    add_rest,
    config_of,
    count,
    modules_of,
    real,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

KIND = "gralora"
_BLOCKS = ("gralora_A", "gralora_B")
_HYBRID = ("gralora_A_general", "gralora_B_general")
_SLOTS = slot_pattern("|".join((*_HYBRID, *_BLOCKS)))


@dataclass(frozen=True)
class Granular:
    """ΔW = s·(blocks + B_g A_g), block (j, n) of rank r/k: the n-th part of B_j's rows times the j-th of A_n's columns.

    As factors of width k·r: left bd(B_1ᵀ, …, B_kᵀ), right the columns of A sorted by output block.

    Attributes:
        down: A (k, in/k, r).
        up: B (k, r, out/k).
        scale: s = α/(r + hybrid r).
        general: (B_g, A_g), a plain LoRA beside the blocks, or None.
    """

    down: TensorRef
    up: TensorRef
    scale: float
    general: tuple[TensorRef, TensorRef] | None = None

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All factors."""
        return (self.down, self.up, *(self.general or ()))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        k = self.down.shape[0]
        return (k * self.up.shape[2], k * self.down.shape[1])

    @property
    def rank(self) -> int:
        """k·r, and the plain LoRA's."""
        k, _, r = self.down.shape
        return min(k * r + (self.general[1].shape[0] if self.general else 0), *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The blocks at their places in both factors."""
        import torch

        down, up = self.down.read_float64(device), self.up.read_float64(device)
        k, inputs, r = down.shape
        left = up.new_zeros(k, up.shape[2], k, r)  # output block j, output, j, column
        right = down.new_zeros(k, k, r // k, k, inputs)  # output block j, input block n, s, input block, input
        parts = down.reshape(k, inputs, k, r // k).permute(2, 0, 3, 1)  # j, n, s, input
        for n in range(k):
            left[n, :, n] = up[n].T
            right[:, n, :, n] = parts[:, n]
        left, right = left.reshape(-1, k * r), right.reshape(k * r, -1)
        if self.general:
            left = torch.cat((left, self.general[0].read_float64(device)), 1)
            right = torch.cat((right, self.general[1].read_float64(device)), 0)
        return LowRank(self.scale * left, right)


def open_gralora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the blocks of every module.

    Raises:
        SourceError: the config is missing, or a rank, k or α in it is no number.
    """
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "GraLoRA")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules(ledger, modules, partial(_granular, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _granular(config: Mapping[str, Any], where: str, module: str, slots: Slots) -> Granular | str:
    """The blocks of one module, or why there are none."""
    r, k, hybrid = count(config, "r", where), count(config, "gralora_k", where), config.get("hybrid_r", 0)
    if isinstance(hybrid, bool) or not isinstance(hybrid, int) or hybrid < 0:
        raise SourceError(f"{where}: hybrid_r = {hybrid!r} is no rank; mend adapter_config.json")
    why = unusable(slots, (*_BLOCKS, *(_HYBRID if hybrid or set(_HYBRID) & set(slots) else ())))
    if why:
        return why
    down, up = (slots[name] for name in _BLOCKS)
    if len(down.shape) != 3 or len(up.shape) != 3 or (down.shape[0], down.shape[2], *up.shape[:2]) != (k, r, k, r):
        return (
            f"the config says r = {r} and gralora_k = {k} for {module}, gralora_A and gralora_B in {where} are "
            f"{list(down.shape)} and {list(up.shape)}"
        )
    if r % k:
        return f"r = {r} of {module} is not divisible by gralora_k = {k}"
    scale = real(config, "alpha", where) / (r + hybrid)
    if not hybrid and not set(_HYBRID) & set(slots):
        return Granular(down, up, scale)
    right, left = (slots[name] for name in _HYBRID)
    if right.shape != (hybrid, k * down.shape[1]) or left.shape != (k * up.shape[2], hybrid):
        return (
            f"the config says hybrid_r = {hybrid} for {module}, the plain factors in {where} are {list(left.shape)} "
            f"and {list(right.shape)}"
        )
    return Granular(down, up, scale, (left, right))
