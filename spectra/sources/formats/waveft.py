"""WaveFT: a few wavelet coefficients at random places make ΔW (Bilican et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_HAAR = "db1"


@dataclass(frozen=True)
class Wavelets(FromTensors):
    """ΔW = s·(inverse Haar transform of the coefficients), or s·coefficients without the transform.

    The places are the first n of torch's permutation of out·in from the seed, on the CPU. An odd side
    is padded by one for the transform, and the middle is cut out of its result.

    Attributes:
        shape: (out, in).
        coefficients: (n,).
        seed: of the places.
        scale: s.
        transformed: whether the coefficients are those of a wavelet.
    """

    shape: tuple[int, int]
    coefficients: TensorRef
    seed: int
    scale: float
    transformed: bool

    @property
    def rank(self) -> int:
        """n: each coefficient stands for an outer product."""
        return min(self.coefficients.numel, *self.shape)

    @property
    def reading_bytes(self) -> int:
        """The permutation of all places, the coefficients' matrix, and its transform's parts."""
        return 8 * (6 if self.transformed else 3) * self.shape[0] * self.shape[1]

    def read(self, device: str = "cpu") -> Dense:
        """Scatter the coefficients, transform them."""
        out, inputs = self.shape
        coefficients = self.coefficients.read_float64(device)
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.randperm(out * inputs, generator=generator)[: len(coefficients)].to(device)
        # With one more row or column the offset is 1 // 2 = 0, both into the padding and out of it.
        padded = coefficients.new_zeros(out + out % 2, inputs + inputs % 2)
        padded[places // inputs, places % inputs] = coefficients
        return Dense(self.scale * (_inverse_haar(padded)[:out, :inputs] if self.transformed else padded[:out, :inputs]))


def _inverse_haar(coefficients: Tensor) -> Tensor:
    """One level of the orthonormal transform back: each 2×2 block from its mean and its three differences."""
    rows, columns = coefficients.shape[0] // 2, coefficients.shape[1] // 2
    mean, across = coefficients[:rows, :columns], coefficients[:rows, columns:]
    down, both = coefficients[rows:, :columns], coefficients[rows:, columns:]
    upper = torch.stack((mean + down + across + both, mean - down + across - both), -1)
    lower = torch.stack((mean + down - across - both, mean - down - across + both), -1)
    return torch.stack((upper, lower), 1).reshape(coefficients.shape) / 2


def read(ledger: Ledger) -> None:
    """Enter the coefficients of every module.

    Raises:
        SourceError: the seed of the places is none.
    """
    config = ledger.config
    transformed, seed = config.flag("use_idwt"), config.get("random_loc_seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise SourceError(f"{ledger.where}: random_loc_seed = {seed!r} is no seed; mend adapter_config.json")

    def build(module: str, slots: Slots, base: TensorRef) -> Wavelets:
        (coefficients,) = slots.real("waveft_spectrum")
        family = config.get("wavelet_family")
        if transformed and family != _HAAR:
            raise Refusal(f"the wavelet {family!r} in {ledger.where} is not supported; {_HAAR} is")
        if len(coefficients.shape) != 1 or coefficients.numel > base.numel:
            raise Refusal(f"waveft_spectrum {list(coefficients.shape)} of {module} does not fit {list(base.shape)}")
        return Wavelets((base.shape[0], base.shape[1]), coefficients, seed, config.real("scaling"), transformed)

    add_modules_on_base(ledger, ledger.modules(slot_pattern("waveft_spectrum")), build)
