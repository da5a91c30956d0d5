"""PEANuT: a small network reads W₀ and writes ΔW, of rank r (Zhong et al. 2024, eq. 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

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

KIND = "peanut"
_SLOTS = slot_pattern(r"peanut_[AB]|peanut_encoders\.\d+|peanut_decoders\.\d+")
ACTIVATIONS = ("relu", "gelu", "silu", "swish", "tanh", "sigmoid", "linear")


@dataclass(frozen=True)
class WrittenByNetwork:
    r"""ΔW = s·B·hᵀ: h₀ = φ(W₀ᵀAᵀ), encoders hᵢ = φ(hᵢ₋₁Eᵢᵀ), decoders h ← φ(hDⱼᵀ) + h_{d−j} back up.

    Attributes:
        base: W₀ (out, in).
        down: A (r, out).
        up: B (out, r).
        encoders: E (r, r) each, in order.
        decoders: D (r, r) each, as many.
        activation: φ, one of `ACTIVATIONS`.
        scale: s.
    """

    base: TensorRef
    down: TensorRef
    up: TensorRef
    encoders: tuple[TensorRef, ...]
    decoders: tuple[TensorRef, ...]
    activation: str
    scale: float

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the network's weights."""
        return (self.base, self.down, self.up, *self.encoders, *self.decoders)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.base.shape[0], self.base.shape[1])

    @property
    def rank(self) -> int:
        """r."""
        return min(self.down.shape[0], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """Left s·B, right hᵀ."""
        base = self.base.read_float64(device)
        hidden = self._activated(self.down.read_float64(device) @ base)  # hᵀ (r, in) throughout
        passed = []
        for encoder in self.encoders:
            passed.append(hidden)
            hidden = self._activated(encoder.read_float64(device) @ hidden)
        for decoder in self.decoders:
            hidden = self._activated(decoder.read_float64(device) @ hidden) + passed.pop()
        return LowRank(self.scale * self.up.read_float64(device), hidden, float(base.norm()))

    def _activated(self, values: Tensor) -> Tensor:
        from torch.nn import functional

        if self.activation == "linear":
            return values
        name = {"swish": "silu"}.get(self.activation, self.activation)
        return getattr(functional, name)(values)


def open_peanut(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the network of every module.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is missing, or its activation or a number in it is unknown.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "PEANuT")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "PEANuT")
    if config.get("act_fn") not in ACTIVATIONS:
        raise SourceError(f"{tuned.path}: act_fn = {config.get('act_fn')!r} is none of {', '.join(ACTIVATIONS)}")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_network, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _network(
    config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef
) -> WrittenByNetwork | str:
    """The network of one module, or why there is none."""
    r, depth = count(config, "r", where), config.get("depth")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise SourceError(f"{where}: depth = {depth!r} is no number of layers; mend adapter_config.json")
    inner = len(slots) - len({"peanut_A", "peanut_B"} & set(slots))
    if inner > 2 * depth or depth > inner:
        return f"the config says depth = {depth} for {module}, {where} holds {inner} inner layers, not two for each"
    encoders, decoders = ([f"peanut_{side}.{i}" for i in range(depth)] for side in ("encoders", "decoders"))
    why = unusable(slots, ("peanut_A", "peanut_B", *encoders, *decoders))
    if why:
        return why
    wanted = {"peanut_A": (r, base.shape[0]), "peanut_B": (base.shape[0], r)}
    for name, ref in slots.items():
        if ref.shape != wanted.get(name, (r, r)):
            return f"{name} {list(ref.shape)} of {module} does not fit r = {r} and the base weight {list(base.shape)}"
    return WrittenByNetwork(
        base,
        slots["peanut_A"],
        slots["peanut_B"],
        tuple(slots[name] for name in encoders),
        tuple(slots[name] for name in decoders),
        config["act_fn"],
        real(config, "scaling", where),
    )
