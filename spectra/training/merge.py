"""Fold adapters into the weights, and take them out again bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from spectra.training.adapter import Adapter, Heads
from spectra.training.config import AdapterError
from spectra.training.inject import MERGED, attach, attached, detach
from spectra.training.targets import is_conv1d, modules_of

Model = TypeVar("Model", bound=nn.Module)
_REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Merged:
    """What a layer keeps to undo a merge: its adapter, and its weight as it was."""

    adapter: Adapter
    base: Tensor


def merge_adapter(model: Model, *, heads: Heads = None, keep_base: bool = True) -> Model:
    """Put W + ΔW in place of every adapted weight W; the model then is a plain one, without inference cost.

    ΔW is formed and added in float64 and rounded once, to the weight's dtype.

    Args:
        model: a model with adapters; it is changed and returned.
        heads: which ΔW of routed heads: "mean", "sum" or an index. Without a router the mean is what the
            model computes, and the default.
        keep_base: keep a copy of every weight, so that `unmerge_adapter` restores it; False saves that memory.

    Raises:
        AdapterError: there is no adapter; routed heads and no definition; a weight that is shared with
            another layer or quantised; an adapter that is not finite. The model is then as it was.
    """
    layers = attached(model)
    if not layers:
        raise AdapterError("the model has no adapter to merge; call inject_adapter or load_adapter first")
    _refuse_shared(model, layers)
    updates = {name: _checked(name, layer, adapter, heads) for name, (layer, adapter) in layers.items()}
    for name, (layer, _) in layers.items():
        weight, adapter = _weight(layer), detach(layer)
        if keep_base:
            object.__setattr__(layer, MERGED, Merged(adapter, weight.detach().clone()))
        left, right = updates[name]
        with torch.no_grad():
            weight.copy_(weight.double() + _oriented(layer, left @ right))
    return model


def unmerge_adapter(model: Model) -> Model:
    """Undo `merge_adapter`: every weight is restored bit for bit and the adapters are at work again.

    Raises:
        AdapterError: nothing is merged, or it was merged with `keep_base=False`.
    """
    layers = {name: layer for name, layer in modules_of(model).items() if MERGED in vars(layer)}
    if not layers:
        raise AdapterError("no adapter is merged into the model, or it was merged with keep_base=False")
    for layer in layers.values():
        kept, weight = vars(layer).pop(MERGED), _weight(layer)
        with torch.no_grad():
            weight.copy_(kept.base)
        attach(layer, kept.adapter.to(weight.device).train(layer.training))
    return model


def merged(model: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    """Name → layer and adapter, for layers whose adapter is merged and can be undone."""
    layers = modules_of(model).items()
    return {name: (layer, vars(layer)[MERGED].adapter) for name, layer in layers if MERGED in vars(layer)}


def _checked(name: str, layer: nn.Module, adapter: Adapter, heads: Heads) -> tuple[Tensor, Tensor]:
    """The factors of the update, or the reason why it cannot be merged."""
    weight = _weight(layer)
    if weight.dtype not in _REAL:
        raise AdapterError(
            f"{name}.weight is stored as {weight.dtype}; merging needs real numbers: dequantise it first"
        )
    try:
        left, right = adapter.factors(heads)
    except AdapterError as problem:
        raise AdapterError(f"{name}: {problem}") from None
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise AdapterError(f"{name}: the adapter holds NaN or infinite numbers; the training has diverged")
    return left, right


def _refuse_shared(model: nn.Module, layers: dict[str, tuple[nn.Module, Adapter]]) -> None:
    owners: dict[int, str] = {}
    for name, module in modules_of(model).items():
        for short, parameter in module.named_parameters(recurse=False):
            if short == "weight" and name not in layers:
                owners[id(parameter)] = name
    for name, (layer, _) in layers.items():
        weight = _weight(layer)
        other = owners.setdefault(id(weight), name)
        if other != name:
            raise AdapterError(
                f"{name}.weight is tied to {other}.weight, so merging would change both; "
                f"untie it first: give {name} a weight of its own"
            )


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _oriented(layer: nn.Module, delta: Tensor) -> Tensor:
    return delta.T if is_conv1d(layer) else delta
