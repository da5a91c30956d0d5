"""RandLoRA: ΔW of full rank from random low-rank bases that are shared, and trained scales (Albert et al. 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import FromTensors
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.formats.vera import shared_projections
from spectra.sources.ledger import Ledger


@dataclass(frozen=True)
class RandomBases(FromTensors):
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
    def rank(self) -> int:
        """Full, since k·r ≥ min(out, in): factors would save nothing."""
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


def read(ledger: Ledger) -> None:
    """Enter every module's scales of the shared bases.

    Raises:
        UnsupportedFormatError: the bases were not saved.
        SourceError: r or α in the config is unusable.
    """
    r = ledger.config.count("r")
    s = ledger.config.real("randlora_alpha") / r
    modules = ledger.modules(slot_pattern("randlora_lambda|randlora_gamma"))
    A, B = shared_projections(ledger)

    def build(module: str, slots: Slots, base: TensorRef) -> RandomBases:
        lam, gamma = Slots({**slots, "A": A, "B": B}).real("randlora_lambda", "randlora_gamma", "A", "B")[:2]
        short, long = min(base.shape), max(base.shape)
        k = math.ceil(short / r)
        if lam.shape != (r, k) or gamma.shape != (k, short):
            there = f"randlora_lambda {list(lam.shape)} and randlora_gamma {list(gamma.shape)}"
            raise Refusal(f"{there} are not {[r, k]} and {[k, short]}, as r in the config and the base have it")
        if len(A.shape) != 3 or A.shape[:2] != (r, 1) or A.shape[2] < short:
            raise Refusal(f"the shared randlora_A {list(A.shape)} is not {[r, 1, short]} or more")
        if len(B.shape) != 3 or B.shape[2] != r or B.shape[0] < long or B.shape[1] < k:
            raise Refusal(f"the shared randlora_B {list(B.shape)} is not {[long, k, r]} or more")
        return RandomBases(A, B, lam, gamma, (base.shape[0], base.shape[1]), s)

    add_modules_on_base(ledger, modules, build)
