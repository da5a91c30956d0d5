"""A LoRA as PEFT loads it: `adapter_model.safetensors` and `adapter_config.json`.

Every α is r, so that s = 1 and ΔW = B·A. Modules are named by their whole paths, so that nothing else is hit.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spectra.errors import SelectionError
from spectra.extraction.factors import Factors
from spectra.extraction.kohya import is_flat
from spectra.extraction.modules import Module
from spectra.extraction.output import TensorFile
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# The first version that takes the last axis of a stack of experts for the inputs, unless its module says otherwise.
_VERSION_OF_STACKS = "0.19.0"


class Peft:
    """Writes one PEFT adapter.

    Attributes:
        base_model: what `base_model_name_or_path` says; "" where it is not known.
        all_modules: paths of the base's modules, which no pattern may hit by accident.
        component: of a pipeline, the one component that is adapted, whose paths start with its name; "" elsewhere.
        replication: the ranges of the base's layers that PEFT is to repeat first; [] for none.
    """

    file = FILE

    def __init__(
        self,
        base_model: str = "",
        all_modules: Collection[str] = (),
        component: str = "",
        replication: Sequence[Any] = (),
    ) -> None:
        self.base_model = base_model
        self.replication = replication
        self.component = component
        self.all_modules = [self.in_model(path) for path in all_modules]
        self._ranks: dict[str, int] = {}
        self._modules: dict[str, Module] = {}
        self._biases: set[str] = set()

    def why_not(self, module: Module) -> str:
        """Why PEFT has no LoRA for a module; "" if it has."""
        if is_flat(module.path):
            return "the file has underscores for the dots of its modules' paths: pass the base (--base)"
        return ""

    def in_model(self, path: str) -> str:
        """A module's path in the model that PEFT wraps: a pipeline's components are models of their own."""
        return path.removeprefix(f"{self.component}.") if self.component else path

    def tensors(self, module: Module, factors: Sequence[Factors]) -> dict[str, Tensor]:
        """Stored name → tensor, for a module that gets a LoRA; of experts, one pair of factors for all."""
        owner = self.in_model(module.path)
        path = f"{owner}.{module.parameter}" if module.parameter else owner
        self._ranks[path] = factors[0].rank
        self._modules[path] = module
        stem = f"{_PREFIX}{path if module.kind == 'experts' else owner}"
        if module.kind == "experts":
            down, up = _stacked(factors, module.transposed)
            return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        down, up = factors[0].A, factors[0].B
        if module.kind == "embedding":
            return {f"{stem}.lora_embedding_A": up.mT, f"{stem}.lora_embedding_B": down.mT}
        if module.kind == "convolution":
            down = down.reshape(down.shape[0], -1, *module.kernel)
            up = up.reshape(*up.shape, *(1 for _ in module.kernel))
        return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}

    def whole(self, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored name → tensor, for a module that is kept whole."""
        return {f"{_PREFIX}{self.in_model(module)}.{name}": tensor for name, tensor in tensors.items()}

    def bias(self, module: str, tensor: Tensor) -> dict[str, Tensor]:
        """Stored name → tensor, for a bias, which takes the place of the base's; {} where PEFT has no place for it."""
        path = self.in_model(module)
        beside = [own for own in self._modules.values() if self.in_model(own.path) == path]
        if any(own.parameter for own in beside):
            return {}
        self._biases.add("lora_only" if beside else "all")
        return {f"{_PREFIX}{path}.{'base_layer.' if beside else ''}bias": tensor}

    def finish(self, file: TensorFile, whole: Collection[str]) -> None:
        """Write the weights under their final names, and the config.

        Args:
            file: the weights.
            whole: paths of modules that are saved whole.
        """
        for old, new in self._nested().items():
            for factor in ("lora_A", "lora_B"):
                file.rename(f"{_PREFIX}{old}.{factor}.weight", f"{_PREFIX}{new}.{factor}.weight")
        file.close({"format": "pt"})
        config = json.dumps(self._config(whole), indent=2, ensure_ascii=False)
        (file.path.parent / "adapter_config.json").write_text(config + "\n", encoding="utf-8")

    def _nested(self) -> dict[str, str]:
        """Stacked parameter → where PEFT keeps its factors.

        It wraps the module that holds the parameters, once for each, the first parameter (`gate_up_proj`) inside.
        """
        owners = Counter(module.path for module in self._modules.values() if module.kind == "experts")
        return {
            path: f"{module.path}.base_layer"
            if owners[module.path] > 1 and module.parameter == "gate_up_proj"
            else module.path
            for path, module in self._modules.items()
            if module.kind == "experts"
        }

    def _config(self, whole: Collection[str]) -> dict[str, Any]:
        rank = Counter(self._ranks.values()).most_common(1)[0][0] if self._ranks else 1
        others = {self._pattern(path): own for path, own in self._ranks.items() if own != rank}
        parameters = sorted(path for path, module in self._modules.items() if module.parameter)
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self.base_model or None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": self._targets(),
            "modules_to_save": sorted(map(self.in_model, whole)) or None,
            "fan_in_fan_out": any(module.transposed and module.kind == "linear" for module in self._modules.values()),
            "bias": min(self._biases, default="none"),  # "all" if there is any beside no LoRA
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
        }
        if self.replication:
            config["layer_replication"] = self.replication
        if parameters:
            config |= {"target_parameters": parameters, "peft_version": _VERSION_OF_STACKS}
        return config

    def _targets(self) -> list[str] | str:
        """The modules' paths, or a regular expression where a path is the end of another module's."""
        paths = sorted(path for path, module in self._modules.items() if not module.parameter)
        wanted = set(paths)
        if any(other not in wanted and _ends_with_any(other, wanted) for other in self.all_modules):
            return "|".join(map(re.escape, paths))
        return paths

    def _pattern(self, path: str) -> str:
        r"""A key of `rank_pattern`, which PEFT takes for a regular expression: `(.*\.)?(key)$`.

        The path itself where that hits no other module of the adapter.
        """
        key = re.compile(rf"(.*\.)?({path})$")
        hit = any(key.match(other) for other in self._ranks if other != path)
        return f"^{re.escape(path)}" if hit else path


def component_of(paths: Iterable[str], components: Collection[str]) -> str:
    """The one component of a pipeline that has all of the paths; "" where the base is no pipeline.

    Raises:
        SelectionError: they are of several, each a model that PEFT wraps on its own.

    Example:
        >>> component_of(["unet.mid_block.conv"], ["unet", "vae"])
        'unet'
    """
    named = sorted({path.partition(".")[0] for path in paths} & set(components))
    if len(named) > 1:
        raise SelectionError(
            f"a PEFT adapter is of one model, and these are {' and '.join(named)} of a pipeline: choose one with "
            f"--layer 're:^{named[0]}\\.', or all with --format kohya"
        )
    return named[0] if named else ""


def _ends_with_any(path: str, ends: Collection[str]) -> bool:
    words = path.split(".")
    return any(".".join(words[start:]) in ends for start in range(1, len(words)))


def _stacked(factors: Sequence[Factors], crossed: bool) -> tuple[Tensor, Tensor]:
    """One A (E·r, in), expert by expert, and one B (out, r·E), rank by rank; in and out change places if crossed."""
    pairs = [(each.B.mT, each.A.mT) if crossed else (each.A, each.B) for each in factors]
    down = torch.cat([down for down, _ in pairs])
    up = torch.stack([up for _, up in pairs], dim=2)
    return down, up.flatten(1)
