"""RandLoRA: ΔW of full rank from random low-rank bases that are shared, and trained scales (Albert et al. 2025, §3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from spectra.deltas.forms import Dense
from spectra.deltas.source import Source
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    config_of,
    count,
    modules_of,
    need_base,
    real,
    refuse_options,
    shared_tensor,
    slot_pattern,
    unusable,
)
from spectra.sources.formats.vera import refuse_unsaved
from spectra.sources.ledger import Ledger

KIND = "randlora"
_SLOTS = slot_pattern("randlora_lambda|randlora_gamma")


@dataclass(frozen=True)
class RandomBases:
    r"""ΔW = s · B̃ · Ã, transposed where out < in, with B̃ (long, k·r) and Ã (r·k, short).

    B̃ is B (long, k, r) flattened basis-major and Ã[(i, j)] = λ[i, j] A[i] ∘ γ[j] rank-major: the two flattenings
    differ, and PEFT multiplies them as they are.

    Attributes:
        A: (r, 1, ≥ short), shared.
        B: (≥ long, ≥ k, r), shared.
        lam: λ (r, k).
        gamma: γ (k, short).
        shape: (out, in).
        scale: s.
    """

    A: TensorRef
    B: TensorRef
    lam: TensorRef
    gamma: TensorRef
    shape: tuple[int, int]
    scale: float

    @property
    def factored(self) -> bool:
        """False: k·r ≥ min(out, in)."""
        return False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The bases and the scales."""
        return (self.A, self.B, self.lam, self.gamma)

    @property
    def rank(self) -> int:
        """Full."""
        return min(self.shape)

    def read(self, device: str = "cpu") -> Dense:
        """The matrix in float64."""
        out, inside = self.shape
        bases = self.gamma.shape[0]
        A = self.A.read_float64(device)[:, :bases, : min(self.shape)]
        B = self.B.read_float64(device)[: max(self.shape), :bases]
        lam, gamma = self.lam.read_float64(device), self.gamma.read_float64(device)
        scaled = (lam[:, :, None] * A * gamma).flatten(0, 1)
        matrix = self.scale * B.flatten(1) @ scaled
        return Dense(matrix if out >= inside else matrix.T)


def open_randlora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the shared bases and every module's scales.

    Raises:
        BaseRequiredError: there is no base; the file does not hold the shapes of the weights.
        UnsupportedFormatError: the bases were not saved.
        SourceError: the config is missing or unusable.
    """
    config = config_of(tuned, "the scale of RandLoRA")
    r = count(config, "r", tuned.path)
    s = real(config, "randlora_alpha", tuned.path) / r
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    modules, rest = modules_of(ledger, _SLOTS)
    A, rest = shared_tensor(ledger, rest, "randlora_A")
    B, rest = shared_tensor(ledger, rest, "randlora_B")
    if A is None or B is None:
        refuse_unsaved(tuned, "RandLoRA")
    need_base(ledger, "RandLoRA", "needs the shapes of the weights, which its file does not hold")
    add_modules_on_base(ledger, modules, partial(_update, r, s, A, B), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _update(
    r: int, s: float, A: TensorRef, B: TensorRef, module: str, slots: Slots, base: TensorRef
) -> RandomBases | str:
    why = unusable({**slots, "A": A, "B": B}, ("randlora_lambda", "randlora_gamma", "A", "B"))
    if why:
        return why
    lam, gamma = slots["randlora_lambda"], slots["randlora_gamma"]
    short, long = min(base.shape), max(base.shape)
    k = math.ceil(short / r)
    if lam.shape != (r, k) or gamma.shape != (k, short):
        there = f"randlora_lambda {list(lam.shape)} and randlora_gamma {list(gamma.shape)}"
        return f"{there} are not {[r, k]} and {[k, short]}, as r in the config and the base have it"
    if len(A.shape) != 3 or A.shape[:2] != (r, 1) or A.shape[2] < short:
        return f"the shared randlora_A {list(A.shape)} is not {[r, 1, short]} or more"
    if len(B.shape) != 3 or B.shape[2] != r or B.shape[0] < long or B.shape[1] < k:
        return f"the shared randlora_B {list(B.shape)} is not {[long, k, r]} or more"
    return RandomBases(A, B, lam, gamma, (base.shape[0], base.shape[1]), s)
