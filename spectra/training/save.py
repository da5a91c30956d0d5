"""Adapters as files: `adapter_config.json` and `adapter_model.safetensors`, which `spectra.open_source` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectra.training.adapter import Adapter
from spectra.training.config import AdapterError, Config, from_json, to_json
from spectra.training.inject import adapter_for, attach, attached, refuse_second
from spectra.training.merge import merged
from spectra.training.targets import is_adaptable, modules_of

Model = TypeVar("Model", bound=nn.Module)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SLOTS = (
    "multilora_A", "multilora_B", "multilora_scaling",
    "rlora_A", "rlora_B", "rlora_router", "rlora_offset_A", "rlora_offset_B",
)  # fmt: skip


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the model's adapters, and whatever else of it is trainable, to a directory.

    Keys are `base_model.model.<layer>.<tensor>`, the tensors those of `MultiLoRA` and `RLoRA`; trainable
    weights outside the adapters are saved whole, and `modules_to_save` in the config names their modules.

    Returns:
        The directory.

    Raises:
        AdapterError: there is no adapter, the model holds several kinds, or an adapted weight itself is trainable.
    """
    layers = attached(model) or merged(model)
    if not layers:
        raise AdapterError("the model has no adapter to save; call inject_adapter first")
    configs = {adapter.config for _, adapter in layers.values()}
    if len(configs) > 1:
        raise AdapterError(f"the model holds adapters of {len(configs)} configs; one directory holds one")
    tensors = {f"{_PREFIX}{name}.{key}": t for name, (_, a) in layers.items() for key, t in a.state_dict().items()}
    others = _others(model)
    for name, parameter in others.items():
        if name.rpartition(".")[0] in layers and name.endswith(".weight"):
            raise AdapterError(f"{name} has an adapter and is trainable itself; freeze it, or do not adapt it")
        tensors[f"{_PREFIX}{name}"] = parameter
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    saved = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    save_file(saved, folder / f".{WEIGHTS}", metadata={"format": "pt"})
    whole = sorted({name.rpartition(".")[0] for name in others})
    config = to_json(configs.pop()) | ({"modules_to_save": whole} if whole else {})
    (folder / f".{CONFIG}").write_text(json.dumps(config, indent=2) + "\n")
    for file in (WEIGHTS, CONFIG):  # each whole or not at all: an interrupted save leaves the one before
        os.replace(folder / f".{file}", folder / file)
    return folder


def load_adapter(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Give the base model the adapters that `save_adapter` wrote, ready to run or to train on.

    The layers are those of the file, whatever the patterns in its config. Everything else is frozen, but
    for weights that were saved whole, which are trainable again.

    Raises:
        AdapterError: a file is missing or broken, does not fit the model, or the model has an adapter.
    """
    refuse_second(model)
    folder = Path(directory)
    config = from_json(_read_config(folder / CONFIG), str(folder / CONFIG))
    modules = modules_of(model)
    groups, whole = _grouped(_read_tensors(folder / WEIGHTS))
    if not groups:
        raise AdapterError(f"{folder / WEIGHTS} holds no adapter of peft_type {config.peft_type}")
    adapters = {name: _filled(name, modules, config, tensors, folder) for name, tensors in groups.items()}
    parameters = _fitting(model, whole, folder)
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        attach(modules[name], adapter)
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(whole[name])
        parameter.requires_grad_(True)
    return model


def _others(model: nn.Module, *, trainable: bool = True) -> dict[str, nn.Parameter]:
    """Clean name → parameter outside the adapters."""
    return {
        f"{name}.{short}".lstrip("."): parameter
        for name, module in modules_of(model).items()
        if not isinstance(module, Adapter)
        for short, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad or not trainable
    }


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist; give the directory that save_adapter wrote") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise AdapterError(f"{path} cannot be read: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path} does not hold an object")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; give the directory that save_adapter wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as problem:
        raise AdapterError(f"{path} is broken: {' '.join(str(problem).split())}; copy it again") from None


def _grouped(stored: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Layer → its adapter's tensors, and the weights that were saved whole."""
    groups: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX)
        module, _, slot = name.rpartition(".")
        if slot in _SLOTS:
            groups.setdefault(module, {})[slot] = tensor
        else:
            whole[name] = tensor
    return groups, whole


def _filled(
    name: str, modules: Mapping[str, nn.Module], config: Config, tensors: Mapping[str, Tensor], folder: Path
) -> Adapter:
    """An adapter of the file's numbers; its shapes are compared before anything is allocated."""
    layer = modules.get(name)
    if layer is None or not is_adaptable(layer):
        what = "the model has no such layer" if layer is None else f"it is a {type(layer).__name__} in the model"
        raise AdapterError(f"{folder} adapts {name}, and {what}; load the base that it was trained on")
    adapter = adapter_for(name, layer, config, empty=True)
    wanted = {key: list(tensor.shape) for key, tensor in adapter.state_dict().items()}
    given = {key: list(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(wanted.keys() | given.keys()):
        if wanted.get(key) != given.get(key):
            raise AdapterError(
                f"{folder}: {name}.{key} has the shape {given.get(key, 'nothing')}, "
                f"the model and {CONFIG} ask for {wanted.get(key, 'nothing')}"
            )
        if not tensors[key].is_floating_point() or not bool(tensors[key].isfinite().all()):
            raise AdapterError(f"{folder}: {name}.{key} does not hold finite real numbers; do not use it")
    weight, like = layer.weight, next(adapter.parameters()).dtype
    assert isinstance(weight, Tensor)
    placed = {key: tensor.to(weight.device, like) for key, tensor in tensors.items()}
    adapter.load_state_dict(placed, assign=True)
    return adapter


def _fitting(model: nn.Module, whole: Mapping[str, Tensor], folder: Path) -> dict[str, nn.Parameter]:
    """The model's parameters for the weights that were saved whole."""
    there = _others(model, trainable=False)
    for name, tensor in whole.items():
        if name not in there or there[name].shape != tensor.shape:
            held = list(there[name].shape) if name in there else "nothing"
            raise AdapterError(f"{folder} holds {name} {list(tensor.shape)}, the model has {held} of that name")
    return {name: there[name] for name in whole}
