"""(IA)³: ΔW = W₀ ∘ l − W₀, a learned factor for every output, or in feed-forward blocks for every input.

Reference: Liu et al. 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import regex

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.naming import split_parts
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_PATTERN_SECONDS = 1.0  # the pattern comes from the file; one that backtracks forever must end


@dataclass(frozen=True)
class Rescaled(OnBase):
    """ΔW = W₀ ∘ (l − 1): rows of the base's weight, or its input channels, multiplied by their own factors.

    Attributes:
        base: W₀ (out, in·kernel).
        gains: l, one entry per row, or per input channel.
        columns: whether l is for the input channels.
        kernel: how many columns one input channel has.
    """

    gains: TensorRef
    columns: bool = False
    kernel: int = 1

    def from_base(self, base: Tensor) -> Dense:
        """W₀ ∘ (l − 1): one exact difference for each factor, and no cancellation between matrices."""
        gains = self.gains.read_float64(str(base.device)).flatten() - 1
        if not self.columns:
            return Dense(base * gains[:, None])
        # A grouped convolution's rows see the input channels of their own group.
        groups = gains.numel() * self.kernel // base.shape[1]
        by_group = gains.reshape(groups, -1).repeat_interleave(self.kernel, 1)
        return Dense(base * by_group.repeat_interleave(base.shape[0] // groups, 0))


def read(ledger: Ledger) -> None:
    """Enter every module's vector.

    Raises:
        SourceError: feedforward_modules in the config is no usable pattern.
    """
    add_modules_on_base(ledger, ledger.modules(slot_pattern("ia3_l")), partial(_rescaled, ledger.config))
    _list_biases(ledger)


def _rescaled(config: Config, module: str, slots: Slots, base: TensorRef) -> Rescaled:
    """The vector of one module; its shape says for which side of the weight it is, of a convolution the config."""
    (gains,), (out, inside) = slots.real("ia3_l"), base.shape
    if gains.shape == (out, 1):
        return Rescaled(base, gains)
    if gains.shape == (1, inside):
        return Rescaled(base, gains, columns=True)
    kernel = math.prod(base.stored[2:])
    if len(base.stored) < 3 or len(gains.shape) != len(base.stored) or gains.numel != gains.shape[1]:
        raise Refusal(f"ia3_l {list(gains.shape)} is neither {[out, 1]} nor {[1, inside]}")
    columns, channels = _is_feedforward(config, module), inside // kernel
    if gains.numel % channels or out % (gains.numel // channels) if columns else gains.numel != out:
        raise Refusal(f"ia3_l {list(gains.shape)} does not fit the convolution {list(base.stored)}")
    return Rescaled(base, gains, columns, kernel)


def _is_feedforward(config: Config, module: str) -> bool:
    """Whether the config counts the module among the feed-forward ones: a list of endings, or a pattern."""
    named = config.get("feedforward_modules")
    if named is None:
        raise Refusal(
            "feedforward_modules, which the config lacks, says whether ia3_l is for this convolution's inputs"
        )
    if isinstance(named, list):
        return any(module.endswith(str(ending)) for ending in named)
    try:
        return regex.fullmatch(str(named), module, timeout=_PATTERN_SECONDS) is not None
    except (TimeoutError, regex.error):
        raise SourceError(
            f"{config.where}: feedforward_modules = {named!r} is not a usable pattern; mend the config"
        ) from None


def _list_biases(ledger: Ledger) -> None:
    """Merging multiplies a module's bias, too, where the factors are for the outputs."""
    biases = ledger.base.tensors if ledger.base else ()
    for delta in ledger.deltas:
        bias = split_parts(delta.name)[0].removesuffix("weight") + "bias"
        recipe = getattr(delta.recipe, "whole", delta.recipe)
        if isinstance(recipe, Rescaled) and not recipe.columns and bias in biases:
            ledger.skipped[bias] = "a bias, which merging multiplies as well; not a matrix"
