"""Attach adapters to the layers of any model, in place."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectra.training.adapter import Adapter, refuse_oversize
from spectra.training.config import AdapterError, Config, MultiLoRAConfig, RLoRAConfig
from spectra.training.multilora import MultiLoRA
from spectra.training.rlora import RLoRA
from spectra.training.targets import modules_of, select_targets, sides

Model = TypeVar("Model", bound=nn.Module)

CHILD = "adapter"
MERGED = "merged_adapter"  # an attribute, not a child: a merged model's state dict is the plain model's


def inject_adapter(model: Model, config: Config) -> Model:
    """Give every target layer an adapter and freeze everything else; the model itself is changed and returned.

    A layer stays where it is, with its name and weight. The adapter is its child, `<layer>.adapter`, and a
    forward hook adds the adapter's output to the layer's. Adapters take the dtype of the layer's
    weight, and float32 where that has fewer bits, since small steps would be lost in it.

    Gradient checkpointing of the reentrant kind needs an input that requires a gradient, which a frozen embedding
    does not give: call transformers' `model.enable_input_require_grads()`, or use the other kind.

    Weights to be trained beside the adapter, such as a new classifier, are unfrozen afterwards with
    `requires_grad_(True)`; `save_adapter` saves them whole.

    Args:
        model: any module tree with Linear or Conv1D layers.
        config: `MultiLoRAConfig` or `RLoRAConfig`.

    Raises:
        AdapterError: a target matches nothing, the model has an adapter already, or a value does not fit.

    Example:
        >>> model = inject_adapter(nn.Sequential(nn.Linear(4, 2)), MultiLoRAConfig(r=1, num_modules=2, alpha=1))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.adapter.multilora_A', '0.adapter.multilora_B', '0.adapter.multilora_scaling']
    """
    refuse_second(model)
    layers = select_targets(model, config.target_modules)
    adapters = {name: adapter_for(name, layer, config) for name, layer in layers.items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        attach(layer, adapters[name])
    return model


def adapter_for(name: str, layer: nn.Module, config: Config, *, empty: bool = False) -> Adapter:
    """A fresh adapter of the layer's sizes, where the layer is and in the dtype that it needs.

    Args:
        name: the layer's name, for messages.
        layer: a Linear or Conv1D.
        config: what to make.
        empty: make it without storage, for tensors to be put in.

    Raises:
        AdapterError: the layer has no storage itself, or r does not fit its sizes.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise AdapterError(f"{name} is on the meta device, without numbers; load the model first")
    out_features, in_features = sides(layer)
    refuse_oversize(config, out_features, in_features, name)
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    device = torch.device("meta") if empty else weight.device
    if isinstance(config, MultiLoRAConfig):
        made: Adapter = MultiLoRA(out_features, in_features, config, device, dtype)
    elif isinstance(config, RLoRAConfig):
        made = RLoRA(out_features, in_features, config, device, dtype)
    else:
        raise AdapterError(f"{type(config).__name__} is neither a MultiLoRAConfig nor an RLoRAConfig")
    return made.train(layer.training)


class Adapted:
    """What a layer with an adapter also is, so that its type says so.

    torch.compile keys what it has compiled on the types of modules, not on their hooks. A layer that had
    been compiled without its adapter and kept its type would go on without it, and nothing would tell.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_class, (type(self).__bases__[1],), vars(self)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _adapted(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(
            f"Adapted{cls.__name__}", (Adapted, cls), {"__doc__": f"A {cls.__name__} with an adapter."}
        )
    return _CLASSES[cls]


def _of_class(cls: type[nn.Module]) -> nn.Module:
    return _adapted(cls).__new__(_adapted(cls))


def attach(layer: nn.Module, adapter: Adapter) -> None:
    """Make the adapter part of the layer, and its output part of the layer's."""
    layer.__class__ = _adapted(type(layer))
    layer.add_module(CHILD, adapter)
    layer.register_forward_hook(_add_update, with_kwargs=True)


def detach(layer: nn.Module) -> Adapter:
    """Take the adapter out again: the layer is what it was before `attach`."""
    adapter = layer.get_submodule(CHILD)
    assert isinstance(adapter, Adapter)
    delattr(layer, CHILD)
    layer.__class__ = type(layer).__bases__[1]
    # By the hook itself, not by its handle: the handle of a copied or unpickled layer belongs to the original.
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _add_update]:
        del layer._forward_hooks[key]
        layer._forward_hooks_with_kwargs.pop(key, None)
    return adapter


def attached(model: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    """Name → layer and adapter, for layers whose adapter is at work."""
    adapters = {}
    for name, layer in modules_of(model).items():
        adapter = layer._modules.get(CHILD)
        if isinstance(adapter, Adapter):
            adapters[name] = (layer, adapter)
    return adapters


def refuse_second(model: nn.Module) -> None:
    """Refuse a model that has adapters, at work or merged.

    Raises:
        AdapterError: it has.
    """
    there = list(attached(model))
    if there:
        raise AdapterError(f"the model has adapters already, such as on {there[0]}; merge them first")
    merged = [name for name, layer in modules_of(model).items() if MERGED in vars(layer)]
    if merged:
        raise AdapterError(
            f"the model holds a merged adapter that can be undone, such as on {merged[0]}; "
            "unmerge it, or merge with keep_base=False"
        )


def _add_update(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    update: Tensor = getattr(layer, CHILD)(x)
    return output + update.to(output.dtype)
