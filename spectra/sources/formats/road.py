"""RoAd: pairs of outputs are turned and scaled, ΔW = R·W₀ − W₀ (Liao et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = ("road_theta", "road_alpha")
_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}  # how many angles and scales each pair of outputs has


@dataclass(frozen=True)
class PairsTurned(OnBase):
    """ΔW = R·W₀ − W₀: outputs j and j + g/2 of each group of g become α cos θ, ∓α sin θ mixtures of both.

    With one (θ, α) per pair R is a rotation times a scale; with two each output has its own; with
    four the cosines and the sines have their own as well.

    Attributes:
        angles: θ.
        scales: α, as many.
        group: g.
    """

    copies = 5
    angles: TensorRef
    scales: TensorRef
    group: int

    def from_base(self, base: Tensor) -> Dense:
        """Both halves of every group at once."""
        cosines, sines = self._coefficients(str(base.device))
        upper, lower = base.reshape(-1, 2, self.group // 2, base.shape[1]).unbind(1)
        turned = torch.stack((-lower, upper), 1).reshape(base.shape)
        return Dense((cosines - 1) * base + sines * turned)

    def _coefficients(self, device: str) -> tuple[Tensor, Tensor]:
        """α cos θ and α sin θ for each output, as columns."""
        angles, scales = self.angles.read_float64(device), self.scales.read_float64(device)
        out, half = self.base.shape[0], self.group // 2
        if angles.numel() == out // 2:
            angles, scales = (x.reshape(-1, 1, half).expand(-1, 2, -1).reshape(out) for x in (angles, scales))
        if angles.numel() == out:
            return (scales * angles.cos()).reshape(-1, 1), (scales * angles.sin()).reshape(-1, 1)
        angles, scales = (x.reshape(-1, 2, self.group) for x in (angles, scales))
        cosines, sines = scales[:, 0] * angles[:, 0].cos(), scales[:, 1] * angles[:, 1].sin()
        return cosines.reshape(-1, 1), sines.reshape(-1, 1)


def read(ledger: Ledger) -> None:
    """Enter the angles and scales of every module.

    Raises:
        SourceError: the config's variant or group size is none.
    """
    variant = ledger.config.get("variant")
    if not isinstance(variant, str) or variant not in _PER_PAIR:
        raise SourceError(f"{ledger.where}: variant = {variant!r} is none of {', '.join(_PER_PAIR)}; mend the config")
    modules = ledger.modules(slot_pattern("|".join(_NAMES)))
    add_modules_on_base(ledger, modules, partial(_pairs, ledger.config, variant))
    if modules:
        ledger.warnings.append("RoAd turns the biases of its modules as well; only matrices are analysed")


def _pairs(config: Config, variant: str, module: str, slots: Slots, base: TensorRef) -> PairsTurned:
    """The pairs of one module, as many as its variant has for the base's outputs."""
    angles, scales = slots.real(*_NAMES)
    group, out = config.count("group_size"), base.shape[0]
    if group % 2 or out % group:
        raise Refusal(f"the {out} outputs of {module} are not in groups of group_size = {group}")
    wanted = (out // 2 * _PER_PAIR[variant],)
    if angles.shape != wanted or scales.shape != wanted:
        raise Refusal(
            f"road_theta {list(angles.shape)} and road_alpha {list(scales.shape)} of {module} are not the {wanted[0]} "
            f"that {variant} has for {out} outputs"
        )
    return PairsTurned(base, angles, scales, group)
