"""Models in memory: modules, PEFT's models and state dicts, as folders of tensors that nobody has to save first.

PEFT is not imported: where it has wrapped a model it is there, and names the tensors as it saves them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from spectra.errors import SourceError, UnsupportedFormatError
from spectra.files.folder import Folder, open_tensors
from spectra.lazy import torch
from spectra.models.pairing import unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn

Model: TypeAlias = "nn.Module | Mapping[str, Tensor]"

_BASE_LAYER = re.compile(r"\.base_layer\.(?=[^.]+$)")
_ORIGINAL = ".original_module."
_OWN = re.compile(r"\.adapter\.(?=(?:multilora|rlora)_)")  # spectra.adapters


def open_in_memory(model: Model, *, as_base: bool = False) -> Folder:
    """The tensors of a model or of a state dict, unread; of a PEFT model what its active adapter's files would hold.

    Args:
        model: a module, a PEFT model, or name → tensor.
        as_base: give the weights that adapters in the model stand on, and not the adapters.

    Raises:
        SourceError: it is something else, an adapter is merged into its weights, or several are active.
        UnsupportedFormatError: its adapters have to be saved first.
    """
    if isinstance(model, Mapping):
        return _of_state_dict(model)
    if not isinstance(model, torch.nn.Module):
        raise SourceError(
            f"{type(model).__name__} is no kind of model: give a path, a hub id, a module or a state dict"
        )
    where = f"the {type(model).__name__} in memory"
    if any(getattr(module, "merged", False) is True and hasattr(module, "base_layer") for module in model.modules()):
        raise SourceError(f"{where} has an adapter merged into its weights; call model.unmerge_adapter() first")
    state = model.state_dict()
    if any(map(_OWN.search, state)) and not as_base:
        raise UnsupportedFormatError(
            f"{where} holds adapters of spectra.adapters: save_adapter(model, folder), and open the folder"
        )
    if as_base:
        return open_tensors(_under_adapters(state), where, config=_config(model))
    if getattr(model, "peft_config", None) and "peft" in sys.modules:
        return _of_peft(model, state)
    return open_tensors(state, where, config=_config(model))


def _of_state_dict(model: Mapping[str, Any]) -> Folder:
    where = "the state dict in memory"
    others = [key for key, value in model.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise SourceError(
            f"{where} has {others[0]!r}, of type {type(model[others[0]]).__name__}, which is no tensor; "
            "give the dict of names and tensors alone"
        )
    return open_tensors({str(name): tensor for name, tensor in model.items()}, where)


def _of_peft(model: Any, state: Mapping[str, Tensor]) -> Folder:
    """The active adapter under the names that PEFT saves it by, and beside it the weights that it stands on."""
    where = f"the {type(model).__name__} in memory"
    active = model.active_adapters  # a method of models of transformers that took an adapter themselves
    active = list(active() if callable(active) else active)
    if len(active) != 1:
        raise SourceError(
            f"{where} has {len(active)} active adapters ({', '.join(active)}); model.set_adapter(…) chooses one"
        )
    name_as_saved = sys.modules["peft"].get_peft_model_state_dict
    saved = name_as_saved(model, state_dict=state, adapter_name=active[0], save_embedding_layers=False)
    held = {name: tensor for name, tensor in state.items() if _BASE_LAYER.search(name) and tensor.is_floating_point()}
    options = json.loads(json.dumps(model.peft_config[active[0]].to_dict(), default=_plain))
    return open_tensors({**held, **saved}, where, config=_config(model), adapter_config=options)


def _plain(value: Any) -> Any:
    """What json has no word for: sets as lists, types and the like as text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _under_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own weights: what adapters added is left out, and what they wrapped has its name again."""
    wrapped = {name[: match.start()] for name in state if (match := _BASE_LAYER.search(name))}
    wrapped |= {name.partition(_ORIGINAL)[0] for name in state if _ORIGINAL in name}
    wrapped |= {name[: match.end() - 1] for name in state if (match := _OWN.search(name))}
    own = {}
    for name, tensor in state.items():
        inside = any(name.startswith(f"{module}.") for module in _parents(name) & wrapped)
        clean = _BASE_LAYER.sub(".", name).replace(_ORIGINAL, ".")
        if not inside or clean != name:
            own[clean] = tensor
    return {short: own[name] for name, short in unwrapped(own).items()}


def _parents(name: str) -> set[str]:
    words = name.split(".")
    return {".".join(words[:end]) for end in range(1, len(words))}


def _config(model: Any) -> dict[str, Any]:
    """The config of a model of transformers; {} for any other module."""
    config = getattr(model, "config", None)
    return dict(config.to_dict()) if config is not None and hasattr(config, "to_dict") else {}
