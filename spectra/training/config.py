"""What an adapter is made of, as plain frozen data that is checked once, and its `adapter_config.json`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal

from spectra.errors import SpectraError

ALL_LINEAR = "all-linear"
_MOST_BRANCHES = 1024  # parallel modules or heads; more is a slip of the keyboard or a hostile file


class AdapterError(SpectraError, ValueError):
    """An adapter cannot be made, attached, merged, saved or loaded as asked; the message says what to change."""


@dataclass(frozen=True)
class MultiLoRAConfig:
    """n parallel low-rank modules on each target: ΔW = (α/r)·Σᵢ diag(sᵢ)·Bᵢ·Aᵢ.

    Attributes:
        r: rank of one module; the rank of ΔW is at most n·r.
        num_modules: n.
        alpha: α; the update is scaled by α/r.
        dropout: probability with which entries of the modules' shared input are dropped in training.
        target_modules: names or patterns of the modules to adapt, see `select_targets`.

    Raises:
        AdapterError: a value is out of its range.

    Example:
        >>> MultiLoRAConfig(r=4, num_modules=3, alpha=8, target_modules="v_proj").scale
        2.0

    Reference: Wang et al. 2023 (MultiLoRA).
    """

    r: int
    num_modules: int
    alpha: float
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR

    peft_type: ClassVar[str] = "MULTILORA"

    def __post_init__(self) -> None:
        _check(self, counts=("r", "num_modules"), positive=("alpha",), probabilities=("dropout",), flags=())

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.r


@dataclass(frozen=True)
class RLoRAConfig:
    """One shared A and N heads on each target: ΔW(x) = s·(Σ_k ω_k(x)·B_k·A − mean_k(B_k⁰)·A⁰), s = α/r.

    The paper and its authors' code start differently. Followed is the paper; `init="released"` is what the code does:
    s = α/√r, a router that starts random, and a start B̄⁰A⁰ that is smaller, 40 times for r = 64, N = 3 and width 768,
    33,000 times for r = 4, N = 5 and width 896 (see `RLoRA`). The mean of the heads is subtracted all the same, so
    that with a random router training starts near the base, not at it.

    Attributes:
        r: rank of A and of every head.
        num_heads: N.
        alpha: α; the update is scaled by α/r, or α/√r with `init="released"`.
        head_dropout: probability with which entries of A·x are dropped in training, with a mask of its own per head.
        use_router: ω(x) = softmax(W_r·x); without a router every ω_k is 1/N.
        gamma: γ of the random initialisation; larger starts smaller.
        target_modules: names or patterns of the modules to adapt, see `select_targets`.
        dropout: probability with which entries of x are dropped in training, once for all heads.
        head_init: "random" as R-LoRA does, with the offset; "zero" as HydraLoRA does, which needs none.
        init: "paper" or "released": whose random start, scale and router.

    Raises:
        AdapterError: a value is out of its range.

    Example:
        >>> RLoRAConfig.hydralora(r=4, num_heads=3, alpha=8, dropout=0.1).head_init
        'zero'

    Reference: Liu et al. 2025 (R-LoRA), and the authors' repository (`reinit.py`, `fine-tuning.sh`); Tian et al.
    2024 (HydraLoRA), §3.
    """

    r: int
    num_heads: int
    alpha: float
    head_dropout: float = 0.1
    use_router: bool = False
    gamma: float = 64.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    dropout: float = 0.0
    head_init: Literal["random", "zero"] = "random"
    init: Literal["paper", "released"] = "paper"

    peft_type: ClassVar[str] = "RLORA"

    def __post_init__(self) -> None:
        _check(
            self,
            counts=("r", "num_heads"),
            positive=("alpha", "gamma"),
            probabilities=("head_dropout", "dropout"),
            flags=("use_router",),
        )
        if self.head_init not in ("random", "zero"):
            raise AdapterError(f"head_init = {self.head_init!r} is neither 'random' nor 'zero'")
        if self.init not in ("paper", "released"):
            raise AdapterError(f"init = {self.init!r} is neither 'paper' nor 'released'")
        if self.init == "released" and not (self.use_router and self.head_init == "random"):
            lacking = "use_router=True" if not self.use_router else "head_init='random'"
            raise AdapterError(f"init = 'released' is R-LoRA as its authors' code has it: it needs {lacking}")

    @classmethod
    def hydralora(
        cls,
        r: int,
        num_heads: int,
        alpha: float,
        dropout: float = 0.0,
        use_router: bool = True,
        target_modules: str | Sequence[str] = ALL_LINEAR,
    ) -> RLoRAConfig:
        """The baseline without randomisation: zero heads, one dropout on x, as HydraLoRA has them.

        Without a router its heads get equal gradients from equal starts, so they stay equal.
        """
        return cls(
            r, num_heads, alpha, 0.0, use_router, target_modules=target_modules, dropout=dropout, head_init="zero"
        )

    @property
    def scale(self) -> float:
        """α/r, or α/√r of the released code."""
        return self.alpha / (math.sqrt(self.r) if self.init == "released" else self.r)


Config = MultiLoRAConfig | RLoRAConfig
CONFIGS: tuple[type[MultiLoRAConfig] | type[RLoRAConfig], ...] = (MultiLoRAConfig, RLoRAConfig)

_FILE_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}  # where PEFT's name differs from ours
_ROOT_SCALE = "use_rslora"  # PEFT's name for s = α/√r, by which any reader of the file comes to the right scale
# What says nothing of the adapter itself; the tensors in the file say which modules were saved whole.
_HARMLESS = {
    "base_model_name_or_path", "task_type", "inference_mode", "auto_mapping", "revision", "peft_version",
    "modules_to_save",
}  # fmt: skip


def to_json(config: Config) -> dict[str, Any]:
    """The config as `adapter_config.json` holds it.

    Example:
        >>> to_json(MultiLoRAConfig(4, 3, 8.0, target_modules=["v_proj"]))["lora_alpha"]
        8.0
    """
    values = {_FILE_NAMES.get(item.name, item.name): getattr(config, item.name) for item in fields(config)}
    if isinstance(config, RLoRAConfig):
        values[_ROOT_SCALE] = config.init == "released"
    return {"peft_type": config.peft_type, **values, "target_modules": list(config.target_modules)}


def from_json(values: Mapping[str, Any], where: str) -> Config:
    """The config that a file holds.

    Raises:
        AdapterError: it is of another adapter, or a field is missing, unknown or out of its range.
    """
    peft_type = values.get("peft_type")
    classes = {cls.peft_type: cls for cls in CONFIGS}
    if not isinstance(peft_type, str) or peft_type not in classes:
        raise AdapterError(f"{where}: peft_type {peft_type!r} is none of {', '.join(classes)}; load others with PEFT")
    cls = classes[peft_type]
    if "init_seed" in values:
        raise AdapterError(
            f"{where} is of a PEFT fork's R-LoRA, whose random start is in no file but drawn again from init_seed = "
            f"{values['init_seed']!r}; load it with the library that saved it"
        )
    if cls is RLoRAConfig:
        values = _without_root_scale(values, where)
    names = {_FILE_NAMES.get(item.name, item.name): item for item in fields(cls)}
    unknown = [name for name in values if name not in names and name not in _HARMLESS | {"peft_type"} and values[name]]
    if unknown:
        raise AdapterError(f"{where}: {unknown[0]} = {values[unknown[0]]!r} is nothing that {peft_type} has")
    missing = [name for name, item in names.items() if item.default is MISSING and name not in values]
    if missing:
        raise AdapterError(f"{where}: {missing[0]} is missing; put the config back that was saved with the weights")
    try:
        return cls(**{item.name: values[name] for name, item in names.items() if name in values})
    except AdapterError as problem:
        raise AdapterError(f"{where}: {problem}") from None


def _without_root_scale(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The values without PEFT's name for s = α/√r, which must say what `init` says."""
    root = bool(values.get(_ROOT_SCALE))
    init = values.get("init", "paper")
    if root != (init == "released"):
        raise AdapterError(
            f"{where}: {_ROOT_SCALE} = {root} contradicts init = {init!r}; "
            "put the config back that was saved with the weights"
        )
    return {name: value for name, value in values.items() if name != _ROOT_SCALE}


def _check(
    config: Config,
    *,
    counts: Sequence[str],
    positive: Sequence[str],
    probabilities: Sequence[str],
    flags: Sequence[str],
) -> None:
    """Refuse values that are out of range, and put the others into plain Python types."""
    put = object.__setattr__
    for name in counts:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) <= 0:
            raise AdapterError(f"{name} = {value!r} is not a positive whole number")
        if name != "r" and int(value) > _MOST_BRANCHES:
            raise AdapterError(f"{name} = {value} is more than {_MOST_BRANCHES}")
        put(config, name, int(value))
    for name in positive:
        number = _real(config, name)
        if not 0 < number < math.inf:
            raise AdapterError(f"{name} = {number!r} is not a positive finite number")
        put(config, name, number)
    for name in probabilities:
        number = _real(config, name)
        if not 0 <= number < 1:
            raise AdapterError(f"{name} = {number!r} is not a probability from 0 to below 1")
        put(config, name, number)
    for name in flags:
        if not isinstance(getattr(config, name), bool):
            raise AdapterError(f"{name} = {getattr(config, name)!r} is neither True nor False")
    put(config, "target_modules", _patterns(config.target_modules))


def _real(config: Config, name: str) -> float:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise AdapterError(f"{name} = {value!r} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise AdapterError(f"{name} is too large for a float") from None


def _patterns(given: object) -> tuple[str, ...]:
    listed = (given,) if isinstance(given, str) else given
    if not isinstance(listed, Sequence | set | frozenset) or not listed:
        raise AdapterError(f"target_modules = {given!r} is not a name, a pattern or a list of them")
    for pattern in listed:
        if not isinstance(pattern, str) or not pattern.strip():
            raise AdapterError(f"target_modules holds {pattern!r}, which is not a name or a pattern")
    return tuple(listed) if isinstance(listed, Sequence) else tuple(sorted(listed))
