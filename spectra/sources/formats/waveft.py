"""WaveFT: a few wavelet coefficients at random places make ΔW (Bilican et al. 2025, §3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.deltas.forms import Dense
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    config_of,
    flag,
    modules_of,
    need_base,
    real,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "waveft"
_SLOTS = slot_pattern("waveft_spectrum")
_HAAR = "db1"


@dataclass(frozen=True)
class Wavelets:
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
    def factored(self) -> bool:
        """False."""
        return False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The coefficients."""
        return (self.coefficients,)

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
        import torch

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
    import torch

    rows, columns = coefficients.shape[0] // 2, coefficients.shape[1] // 2
    mean, across = coefficients[:rows, :columns], coefficients[:rows, columns:]
    down, both = coefficients[rows:, :columns], coefficients[rows:, columns:]
    upper = torch.stack((mean + down + across + both, mean - down + across - both), -1)
    lower = torch.stack((mean + down - across - both, mean - down - across + both), -1)
    return torch.stack((upper, lower), 1).reshape(coefficients.shape) / 2


def open_waveft(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the coefficients of every module.

    Raises:
        BaseRequiredError: there is no base, whose shape the places refer to.
        SourceError: the config is missing, its wavelet is another than db1, or a number in it is none.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "WaveFT", "is saved as coefficients at places of the base weight, whose shape they need")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "WaveFT")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_wavelets, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _wavelets(config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef) -> Wavelets | str:
    """The coefficients of one module, or why there are none."""
    transformed, seed = flag(config, "use_idwt", where), config.get("random_loc_seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise SourceError(f"{where}: random_loc_seed = {seed!r} is no seed; mend adapter_config.json")
    why = unusable(slots, ["waveft_spectrum"])
    if why:
        return why
    if transformed and config.get("wavelet_family") != _HAAR:
        return f"the wavelet {config.get('wavelet_family')!r} in {where} is not supported; {_HAAR} is"
    coefficients = slots["waveft_spectrum"]
    if len(coefficients.shape) != 1 or coefficients.numel > base.numel:
        return f"waveft_spectrum {list(coefficients.shape)} of {module} does not fit {list(base.shape)}"
    return Wavelets((base.shape[0], base.shape[1]), coefficients, seed, real(config, "scaling", where), transformed)
