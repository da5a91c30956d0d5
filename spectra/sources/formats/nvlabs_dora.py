"""DoRA by the authors' own code, a fork of PEFT: the magnitude is a layer, `weight_m_wdecomp.weight` (out, 1).

ΔW = m·(W + s·B·A)/‖W + s·B·A‖ − W with the norm of each row; of modules in `Wdecompose_target_modules` the magnitude
alone was trained, ΔW = m·W/‖W‖ − W. Settled by NVlabs/DoRA, commonsense_reasoning/peft/src/peft/tuners/dora.py, and
visual_instruction_tuning's, whose config says `wdecompose_target_modules`. Reference: Liu et al. 2024, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense
from spectra.deltas.recipes import Factors, OnBase, Term, Update
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.config import Config
from spectra.sources.formats.dora import Dora, misfit
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_ALONE = ("Wdecompose_target_modules", "wdecompose_target_modules")
_SECONDS = 1.0  # the pattern comes from the file


@dataclass(frozen=True)
class Rescaled(OnBase):
    """ΔW = m ∘ W / ‖W‖ − W, row by row, of full rank.

    Attributes:
        magnitude: m (out, 1).
    """

    magnitude: TensorRef

    def from_base(self, base: Tensor) -> Dense:
        """W with another norm of each row, less W, in float64."""
        magnitude = self.magnitude.read_float64(str(base.device)).reshape(-1)
        return Dense((magnitude / base.norm(dim=1) - 1)[:, None] * base)


def read(ledger: Ledger) -> None:
    """Enter every module on its base weight.

    Raises:
        SourceError: the config turns weights round, which the code does in one of two places.
    """
    if ledger.config.get("fan_in_fan_out"):
        raise SourceError(
            f"{ledger.where}: the config says fan_in_fan_out, which this DoRA applies to the weight and not to its "
            "factors, so what it trained is not known"
        )

    def build(module: str, slots: Slots, base: TensorRef) -> Update:
        (magnitude,) = slots.real("weight_m_wdecomp")
        why = misfit(magnitude, (base.shape[0], base.shape[1]), "rows")
        if why:
            raise Refusal(why)
        if not {"lora_A", "lora_B"} & set(slots) and _alone(ledger.config, module):
            return Rescaled(base, magnitude)
        A, B = slots.real("lora_A", "lora_B")
        if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != A.shape[0]:
            raise Refusal(f"lora_A {list(A.shape)} and lora_B {list(B.shape)} of {module} cannot be multiplied")
        term = Term((B,), A, ledger.scale_of(module, A.shape[0]))
        if term.shape != base.shape:
            raise Refusal(f"the update is {list(term.shape)}, the base weight {list(base.shape)}", "shape_mismatch")
        return Dora(base, Factors((term,)), magnitude, "rows")

    add_modules_on_base(ledger, ledger.modules(slot_pattern("lora_[AB]|weight_m_wdecomp")), build)


def _alone(config: Config, module: str) -> bool:
    """Whether the config says that of a module the magnitude alone was trained, by the rule of the code.

    Raises:
        SourceError: it says so by a pattern that cannot be used.
    """
    return not _named(config, "target_modules", module) and any(_named(config, key, module) for key in _ALONE)


def _named(config: Config, key: str, module: str) -> bool:
    """Whether an option means a module: a pattern of its whole name, or ends of names."""
    wanted = config.get(key)
    if isinstance(wanted, str):
        return _fits(config, wanted, module)
    return isinstance(wanted, list) and any(module.endswith(str(end)) for end in wanted)


def _fits(config: Config, pattern: str, module: str) -> bool:
    import regex

    try:
        return regex.fullmatch(pattern, module, timeout=_SECONDS) is not None
    except (TimeoutError, regex.error) as problem:
        raise SourceError(
            f"{config.where}: the pattern {pattern!r} cannot be used ({problem}); mend the config"
        ) from None
