"""The matrices of a model in training and their updates: of adapters by the factors, of weights by a copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectra import naming
from spectra.deltas.forms import Dense, Form, LowRank
from spectra.engine.memory import readable_size
from spectra.training.adapter import Adapter
from spectra.training.config import AdapterError
from spectra.training.merge import merged
from spectra.training.targets import is_adaptable, is_conv1d, modules_of

_PEFT_PREFIX = "base_model.model."
_FROM_ZERO = (True, "gaussian", "eva")  # PEFT's starts that leave the base's weight as it is, with a ΔW of zero
_ZERO = 1e-6  # of ‖L‖‖R‖: what is less is rounding, as of R-LoRA's start, whose parts cancel
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Watched(ABC):
    """One weight and how to get its ΔW since the start of training.

    Attributes:
        name: the weight's name, as checkpoints have it.
        module: the path of its module in the model.
    """

    name: str
    module: str

    @property
    def note(self) -> str:
        """What ΔW stands for where that is not simply W − W₀."""
        return ""

    @property
    def factored(self) -> bool:
        """Whether ΔW is given by factors."""
        return False

    @abstractmethod
    def form(self, modules: Mapping[str, nn.Module]) -> Form:
        """ΔW now, in float64 (out, in), where the weights are; `modules` are the model's by path."""

    def start_factors(self, modules: Mapping[str, nn.Module]) -> Factors | None:
        """The factors as they are now, to be kept of the start; None of a weight."""
        return None


@dataclass(frozen=True, eq=False)
class OfAdapter(Watched):
    """ΔW = left · right from an adapter's factors, less what it was at the start if that was not zero.

    Attributes:
        heads: which ΔW of routed heads.
        before: the factors at the start, where their product was not zero.
    """

    heads: str | int | None = None
    before: Factors | None = None

    @property
    def note(self) -> str:
        """Said of an adapter that was not zero when training started."""
        return "" if self.before is None else "since the start of training, when the adapter was not zero"

    @property
    def factored(self) -> bool:
        """Yes."""
        return True

    def form(self, modules: Mapping[str, nn.Module]) -> LowRank:
        """The factors side by side, never multiplied out."""
        left, right = _factors(modules[self.module], self.name, self.heads)
        if self.before is not None:
            left = torch.cat([left, -self.before[0].to(left.device)], 1)
            right = torch.cat([right, self.before[1].to(right.device)], 0)
        return LowRank(left, right)

    def start_factors(self, modules: Mapping[str, nn.Module]) -> Factors | None:
        """The adapter's own."""
        return _factors(modules[self.module], self.name, self.heads)


@dataclass(frozen=True, eq=False)
class OfWeight(Watched):
    """ΔW = W − W₀ from a copy of W₀.

    Attributes:
        start: W₀ in the weight's own dtype, on the CPU.
    """

    start: Tensor

    def form(self, modules: Mapping[str, nn.Module]) -> Dense:
        """The difference in float64; of a Conv1D transposed."""
        module = modules[self.module]
        now = _real(module, self.name)
        difference = _float64(now) - _float64(self.start.to(now.device))
        return Dense(difference.mT if is_conv1d(module) else difference)


def watched_matrices(
    model: nn.Module, matrices: str | Sequence[str] = (), *, heads: str | int | None = None, resumed: bool = False
) -> list[Watched]:
    """What of a model is to be watched, with what has to be kept of the start.

    Args:
        model: with adapters of PEFT's LoRA or of `spectra.adapters`, or in full training.
        matrices: patterns of weights as `--layer` takes them; () for every adapted one. A model without an adapter
            needs them, since a copy of every chosen weight is kept.
        heads: which ΔW of routed heads: "mean", "sum" or an index.
        resumed: whether the training had begun before, so that the start is not to be seen any more.

    Raises:
        AdapterError: there is no adapter and nothing is chosen; an adapter cannot be taken apart; weights whose start
            is gone.
        SelectionError: a pattern matches nothing.
    """
    modules = modules_of(model)
    if merged(model):
        raise AdapterError("the adapter is merged into the weights: unmerge it before training is watched")
    adapters = {_weight_name(path): path for path, module in modules.items() if _is_adapter(module, path, modules)}
    inside = tuple(f"{path}." for path in adapters.values())
    plain = {
        _weight_name(path): path
        for path, module in modules.items()
        if _is_trained(module) and not path.startswith(inside) and _weight_name(path) not in adapters
    }
    patterns = [matrices] if isinstance(matrices, str) else list(matrices)
    if not patterns and not adapters:
        raise AdapterError(_choose(modules, plain))
    chosen = naming.select(patterns, adapters | plain) if patterns else list(adapters)
    if resumed and any(name in plain for name in chosen):
        raise AdapterError(
            f"training goes on from a checkpoint, where {next(n for n in chosen if n in plain)} is no longer as it was "
            "at the start: use spectra series on the saved checkpoints"
        )
    if resumed:
        _refuse_other_starts(modules[""])
    return [
        _of_adapter(name, adapters[name], modules, heads, resumed) if name in adapters else
        OfWeight(name, plain[name], _real(modules[plain[name]], name).detach().to("cpu", copy=True))
        for name in chosen
    ]  # fmt: skip


def _of_adapter(
    name: str, path: str, modules: Mapping[str, nn.Module], heads: str | int | None, resumed: bool
) -> OfAdapter:
    left, right = _factors(modules[path], name, heads)
    if resumed:
        return OfAdapter(name, path, heads)
    form = LowRank(left, right)
    moved = form.norm > _ZERO * form.magnitude
    return OfAdapter(name, path, heads, (left.clone(), right.clone()) if moved else None)


def _weight_name(path: str) -> str:
    return f"{path.removeprefix(_PEFT_PREFIX)}.weight"


def _is_adapter(module: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module is adapted, by PEFT or by `spectra.adapters`; what cannot be taken apart is refused."""
    if isinstance(module._modules.get("adapter"), Adapter):
        return True
    if not any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
        return False
    if not (hasattr(module, "lora_A") and hasattr(module, "lora_B")):
        kind = type(module).__module__.split(".")[-2]
        raise AdapterError(
            f"{path} is adapted by PEFT's {kind}, and only LoRA is watched by its factors: "
            "use spectra series on the saved checkpoints"
        )
    there: Any = module.lora_A
    return len(there) > 0 and all(layer.weight.ndim == 2 for layer in there.values())


def _is_trained(module: nn.Module) -> bool:
    """Whether it is a Linear or Conv1D whose own weight trains."""
    return is_adaptable(module) and isinstance(module.weight, Tensor) and module.weight.requires_grad


def _factors(module: nn.Module, name: str, heads: str | int | None) -> Factors:
    """left (out, k) and right (k, in) in float64, of all active adapters side by side."""
    own = module._modules.get("adapter")
    if isinstance(own, Adapter):
        left, right = own.factors(heads)
        return _float64(left), _float64(right)
    layer: Any = module
    lefts, rights = [], []
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if adapter in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(adapter):
            raise AdapterError(
                f"{name}: the adapter {adapter!r} is a variant of LoRA (such as DoRA) whose ΔW is not B·A: "
                "use spectra series on the saved checkpoints"
            )
        lefts.append(float(layer.scaling[adapter]) * _float64(_there(layer.lora_B[adapter].weight, name)))
        rights.append(_float64(_there(layer.lora_A[adapter].weight, name)))
    if not lefts:
        raise AdapterError(f"{name}: none of its adapters is active; call set_adapter before training is watched")
    return torch.cat(lefts, 1), torch.cat(rights, 0)


def _refuse_other_starts(model: nn.Module) -> None:
    """Raise where a run goes on whose adapter was not zero at its start, which is not to be seen any more."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    for adapter, config in configs.items():
        how = getattr(config, "init_lora_weights", True)
        if how not in _FROM_ZERO:
            raise AdapterError(
                f"training goes on from a checkpoint, and the adapter {adapter!r} (init_lora_weights={how!r}) was not "
                "zero at its start, which is gone: use spectra series on the saved checkpoints"
            )


def _real(module: nn.Module, name: str) -> Tensor:
    weight: Any = module.weight
    return _there(weight, name)


def _there(weight: Tensor, name: str) -> Tensor:
    """The weight, if all of it is here in real numbers."""
    sharded = weight.numel() == 0 or hasattr(weight, "full_tensor") or weight.is_meta
    if sharded or not weight.is_floating_point():
        what = "spread over several processes" if sharded else f"stored as {weight.dtype}"
        raise AdapterError(f"{name} is {what} and cannot be watched: use spectra series on the saved checkpoints")
    return weight


def _float64(tensor: Tensor) -> Tensor:
    """In float64 where the tensor is, or on the CPU where its device has no float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _choose(modules: Mapping[str, nn.Module], plain: Mapping[str, str]) -> str:
    if not plain:
        return "the model has no adapter and trains no Linear or Conv1D weight: there is nothing to watch"
    weights: list[Any] = [modules[path].weight for path in plain.values()]
    size = readable_size(sum(weight.numel() * weight.element_size() for weight in weights))
    roles = ", ".join(dict.fromkeys(naming.role_of(name) for name in plain))
    return (
        f"the model has no adapter, and a copy of every watched weight is kept ({size} for all {len(plain)}): "
        f"choose matrices=…, such as a role ({roles})"
    )
