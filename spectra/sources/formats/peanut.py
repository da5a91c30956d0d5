"""PEANuT: a small network reads W₀ and writes ΔW, of rank r (Zhong et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import OnBase
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "silu", "swish", "tanh", "sigmoid", "linear")


@dataclass(frozen=True)
class WrittenByNetwork(OnBase):
    r"""ΔW = s·B·hᵀ: h₀ = φ(W₀ᵀAᵀ), encoders hᵢ = φ(hᵢ₋₁Eᵢᵀ), decoders h ← φ(hDⱼᵀ) + h_{d−j} back up.

    Attributes:
        down: A (r, out).
        up: B (out, r).
        encoders: E (r, r) each, in order.
        decoders: D (r, r) each, as many.
        activation: φ, one of `ACTIVATIONS`.
        scale: s.
    """

    factored = True
    copies = 1
    down: TensorRef
    up: TensorRef
    encoders: tuple[TensorRef, ...]
    decoders: tuple[TensorRef, ...]
    activation: str
    scale: float

    @property
    def rank(self) -> int:
        """At most r, the width of the network."""
        return min(self.down.shape[0], *self.shape)

    def from_base(self, base: Tensor) -> LowRank:
        """Left s·B, right hᵀ."""
        device = str(base.device)
        hidden = self._activated(self.down.read_float64(device) @ base)  # hᵀ (r, in) throughout
        passed = []
        for encoder in self.encoders:
            passed.append(hidden)
            hidden = self._activated(encoder.read_float64(device) @ hidden)
        for decoder in self.decoders:
            hidden = self._activated(decoder.read_float64(device) @ hidden) + passed.pop()
        return LowRank(self.scale * self.up.read_float64(device), hidden)

    def _activated(self, values: Tensor) -> Tensor:
        """φ, entry by entry."""
        from torch.nn import functional

        if self.activation == "linear":
            return values
        name = {"swish": "silu"}.get(self.activation, self.activation)
        return getattr(functional, name)(values)


def read(ledger: Ledger) -> None:
    """Enter the network of every module.

    Raises:
        SourceError: the config's activation or a number in it is unknown.
    """
    activation = ledger.config.get("act_fn")
    if activation not in ACTIVATIONS:
        raise SourceError(f"{ledger.where}: act_fn = {activation!r} is none of {', '.join(ACTIVATIONS)}")
    modules = ledger.modules(slot_pattern(r"peanut_[AB]|peanut_encoders\.\d+|peanut_decoders\.\d+"))
    add_modules_on_base(ledger, modules, partial(_network, ledger.config))


def _network(config: Config, module: str, slots: Slots, base: TensorRef) -> WrittenByNetwork:
    """The network of one module, as deep as the config says and without a layer more."""
    r, depth = config.count("r"), config.get("depth")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise SourceError(f"{config.where}: depth = {depth!r} is no number of layers; mend adapter_config.json")
    inner = len(slots) - len({"peanut_A", "peanut_B"} & set(slots))
    if inner > 2 * depth or depth > inner:
        raise Refusal(
            f"the config says depth = {depth} for {module}, {config.where} holds {inner} inner layers, not two for each"
        )
    layers = [f"peanut_{side}.{i}" for side in ("encoders", "decoders") for i in range(depth)]
    down, up, *inner_layers = slots.real("peanut_A", "peanut_B", *layers)
    wanted = {"peanut_A": (r, base.shape[0]), "peanut_B": (base.shape[0], r)}
    for name, ref in slots.items():
        if ref.shape != wanted.get(name, (r, r)):
            raise Refusal(
                f"{name} {list(ref.shape)} of {module} does not fit r = {r} and the base weight {list(base.shape)}"
            )
    encoders, decoders = tuple(inner_layers[:depth]), tuple(inner_layers[depth:])
    return WrittenByNetwork(base, down, up, encoders, decoders, config["act_fn"], config.real("scaling"))
