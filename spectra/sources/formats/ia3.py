"""(IA)³: ΔW = W₀ ∘ l − W₀, a learned factor for every output, or in feed-forward blocks for every input.

Reference: Liu et al. 2022, §3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import regex

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import OnBase
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.naming import split_parts
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    modules_of,
    need_base,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

KIND = "ia3"
_SLOTS = slot_pattern("ia3_l")
_PATTERN_SECONDS = 1.0


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

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The base's weight and the factors."""
        return (self.base, self.gains)

    def read(self, device: str = "cpu") -> Dense:
        """The matrix in float64."""
        base = self.base.read_float64(device)
        gains = self.gains.read_float64(device).flatten() - 1
        if not self.columns:
            return Dense(base * gains[:, None], float(base.norm()))
        # A grouped convolution's rows see the input channels of their own group.
        groups = gains.numel() * self.kernel // base.shape[1]
        by_group = gains.reshape(groups, -1).repeat_interleave(self.kernel, 1)
        return Dense(base * by_group.repeat_interleave(base.shape[0] // groups, 0), float(base.norm()))


def open_ia3(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module's vector.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is unusable.
    """
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    need_base(ledger, "(IA)³")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_update, tuned), split=split)
    _list_biases(ledger)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _update(tuned: Folder, module: str, slots: Slots, base: TensorRef) -> Rescaled | str:
    why = unusable(slots, ("ia3_l",))
    if why:
        return why
    gains, (out, inside) = slots["ia3_l"], base.shape
    if gains.shape == (out, 1):
        return Rescaled(base, gains)
    if gains.shape == (1, inside):
        return Rescaled(base, gains, columns=True)
    kernel = math.prod(base.stored[2:])
    if len(base.stored) < 3 or len(gains.shape) != len(base.stored) or gains.numel != gains.shape[1]:
        return f"ia3_l {list(gains.shape)} is neither {[out, 1]} nor {[1, inside]}"
    columns = _is_feedforward(tuned.adapter_config or {}, module, str(tuned.path))
    if columns is None:
        return "feedforward_modules, which the config lacks, says whether ia3_l is for this convolution's inputs"
    channels = inside // kernel
    if gains.numel % channels or out % (gains.numel // channels) if columns else gains.numel != out:
        return f"ia3_l {list(gains.shape)} does not fit the convolution {list(base.stored)}"
    return Rescaled(base, gains, columns, kernel)


def _is_feedforward(config: Mapping[str, Any], module: str, where: str) -> bool | None:
    """Whether the config counts the module among the feed-forward ones: a list of endings, or a pattern."""
    named = config.get("feedforward_modules")
    if named is None:
        return None
    if isinstance(named, list):
        return any(module.endswith(str(ending)) for ending in named)
    try:
        return regex.fullmatch(str(named), module, timeout=_PATTERN_SECONDS) is not None
    except (TimeoutError, regex.error):
        raise SourceError(
            f"{where}: feedforward_modules = {named!r} is not a usable pattern; mend the config"
        ) from None


def _list_biases(ledger: Ledger) -> None:
    """Merging multiplies a module's bias, too, where the factors are for the outputs."""
    assert ledger.base is not None
    for delta in ledger.deltas:
        bias = split_parts(delta.name)[0].removesuffix("weight") + "bias"
        recipe = getattr(delta.recipe, "whole", delta.recipe)
        if isinstance(recipe, Rescaled) and not recipe.columns and bias in ledger.base.tensors:
            ledger.skipped[bias] = "a bias, which merging multiplies as well; not a matrix"
