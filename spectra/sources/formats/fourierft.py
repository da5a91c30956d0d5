"""FourierFT: ΔW = s·Re(F⁻¹ S), S sparse: n trained coefficients at positions that a seed gives.

Reference: Gao et al. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense, LowRank
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseSpectrum(FromTensors):
    r"""ΔW[p, q] = s/(mn) · Σ_j c_j cos(2π(u_j p/m + v_j q/n)), the real part of an inverse 2-D Fourier transform.

    cos(a + b) = cos a cos b − sin a sin b makes every coefficient two columns and two rows, so ΔW has
    rank ≤ 2n. Where 2n is not below min(m, n) the transform is formed.

    Attributes:
        coefficients: c (count,), real.
        shape: (m, n).
        seed: what the positions (u_j, v_j) are drawn with.
        scale: s.
    """

    coefficients: TensorRef
    shape: tuple[int, int]
    seed: int
    scale: float

    @property
    def factored(self) -> bool:
        """Whether factors are smaller than the matrix."""
        return 2 * self.coefficients.numel < min(self.shape)

    @property
    def rank(self) -> int:
        """Two per coefficient, at most min(m, n)."""
        return min(2 * self.coefficients.numel, *self.shape)

    @property
    def reading_bytes(self) -> int:
        """The permutation of all positions; and the waves, or the transform with its complex numbers."""
        m, n = self.shape
        waves = 8 * 6 * self.coefficients.numel * (m + n)
        return 8 * m * n + (waves if self.factored else 8 * 6 * m * n)

    def read(self, device: str = "cpu") -> LowRank | Dense:
        """The cosines and sines in float64, or the matrix."""
        m, n = self.shape
        c = self.coefficients.read_float64(device)
        # The positions are a prefix of a permutation that torch's CPU generator gives for the seed.
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(m * n, generator=generator)[: c.numel()].to(device)
        u, v = drawn // n, drawn % n
        if not self.factored:
            spectrum = torch.zeros(m, n, dtype=torch.float64, device=device)
            spectrum[u, v] = c
            return Dense(self.scale * torch.fft.ifft2(spectrum).real)
        cos_p, sin_p = _waves(u, m)
        cos_q, sin_q = _waves(v, n)
        left = torch.cat([cos_p, sin_p]).T
        right = torch.cat([c[:, None] * cos_q, -c[:, None] * sin_q])
        return LowRank(self.scale / (m * n) * left, right)


def _waves(frequencies: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π f p / size (count, size); f·p is reduced exactly before it becomes an angle."""
    steps = torch.outer(frequencies, torch.arange(size, device=frequencies.device)) % size
    angles = steps.to(torch.float64) * (2 * math.pi / size)
    return angles.cos(), angles.sin()


def read(ledger: Ledger) -> None:
    """Enter the coefficients of every module; of the base, only the weights' shapes count.

    Raises:
        SourceError: the config does not say the seed, or s.
    """
    config = ledger.config
    s, seed = config.real("scaling"), config.get("random_loc_seed")
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise SourceError(f"{ledger.where}: random_loc_seed = {seed!r} is not a seed; mend adapter_config.json")

    def build(module: str, slots: Slots, base: TensorRef) -> SparseSpectrum:
        (c,) = slots.real("fourierft_spectrum")
        if len(c.shape) != 1 or not 0 < c.numel <= base.numel:
            raise Refusal(f"fourierft_spectrum {list(c.shape)} is not a list of at most {base.numel} coefficients")
        expected = config.override("n_frequency_pattern", module, config.get("n_frequency"))
        if expected not in (None, c.numel):
            raise Refusal(f"the config says n_frequency = {expected!r} for {module}, the file holds {c.numel}")
        return SparseSpectrum(c, (base.shape[0], base.shape[1]), seed, s)

    add_modules_on_base(ledger, ledger.modules(slot_pattern("fourierft_spectrum")), build)
