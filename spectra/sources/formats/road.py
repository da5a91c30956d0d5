"""RoAd: pairs of outputs are turned and scaled, ΔW = R·W₀ − W₀ (Liao et al. 2024, eq. 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
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
    modules_of,
    need_base,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "road"
_NAMES = ("road_theta", "road_alpha")
_SLOTS = slot_pattern("|".join(_NAMES))
_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}  # how many angles and scales each pair of outputs has


@dataclass(frozen=True)
class PairsTurned(OnBase):
    """ΔW = R·W₀ − W₀: outputs j and j + g/2 of each group of g become α cos θ, ∓α sin θ mixtures of both.

    With one (θ, α) per pair R is a rotation times a scale; with two each output has its own; with
    four the cosines and the sines have their own as well.

    Attributes:
        base: W₀ (out, in).
        angles: θ.
        scales: α, as many.
        group: g.
    """

    copies = 5
    angles: TensorRef
    scales: TensorRef
    group: int

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀, angles and scales."""
        return (self.base, self.angles, self.scales)

    def read(self, device: str = "cpu") -> Dense:
        """Both halves of every group at once."""
        import torch

        base = self.base.read_float64(device)
        cosines, sines = self._coefficients(device)
        upper, lower = base.reshape(-1, 2, self.group // 2, base.shape[1]).unbind(1)
        turned = torch.stack((-lower, upper), 1).reshape(base.shape)
        return Dense((cosines - 1) * base + sines * turned, base_norm=float(base.norm()))

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


def open_road(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the angles and scales of every module.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is missing, or its variant or group size is none.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "RoAd")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "RoAd")
    variant = config.get("variant")
    if not isinstance(variant, str) or variant not in _PER_PAIR:
        raise SourceError(f"{tuned.path}: variant = {variant!r} is none of {', '.join(_PER_PAIR)}; mend the config")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_pairs, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    if modules:
        ledger.warnings.append("RoAd turns the biases of its modules as well; only matrices are analysed")
    return ledger.source(KIND)


def _pairs(config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef) -> PairsTurned | str:
    """The pairs of one module, or why there are none."""
    why = unusable(slots, _NAMES)
    if why:
        return why
    angles, scales = (slots[name] for name in _NAMES)
    group, out = count(config, "group_size", where), base.shape[0]
    if group % 2 or out % group:
        return f"the {out} outputs of {module} are not in groups of group_size = {group}"
    wanted = (out // 2 * _PER_PAIR[config["variant"]],)
    if angles.shape != wanted or scales.shape != wanted:
        return (
            f"road_theta {list(angles.shape)} and road_alpha {list(scales.shape)} of {module} are not the {wanted[0]} "
            f"that {config['variant']} has for {out} outputs"
        )
    return PairsTurned(base, angles, scales, group)
