"""Where files without a config of PEFT's kind say their scale, s = α/r.

Trainers write α into a tensor beside the factors (lycoris.py reads it with them), into the file's header (kohya's
`ss_network_alpha` and `ss_network_args`, diffusers' `lora_adapter_metadata`) or into a config beside the file. Where
α is nowhere, s is 1 in the layout whose loaders define it so, which is said; elsewhere the module is refused until
the user gives s.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from spectra.errors import SourceError
from spectra.sources.config import Config
from spectra.sources.formats import components
from spectra.sources.ledger import Ledger, Refusal

_ALPHA_KEYS = ("lora_alpha", "network_alpha", "linear_alpha", "alpha")
_RANK_KEYS = ("r", "rank", "lora_rank", "lora_dim", "network_dim", "linear", "dim")
_UNSAID = ("", "none", "dynamic")  # what kohya's tools write for an α that is not one number
_FUSED = re.compile(r"[._](?:qkv|linear1)$")


class UnknownScale(Refusal):
    """No α is known for a module, and the user gave no scale."""


@dataclass
class Scales:
    """s of every module of a file, and what it was taken from.

    Attributes:
        ledger: the account.
        modules: the file's modules.
        taken: those for which the user's scale was taken.
        told: those for which the file says α.
        folded: those whose file has none, in a layout that then means s = 1.
    """

    ledger: Ledger
    modules: Collection[str]
    taken: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)

    def of(self, module: str, convolution: bool, rank: int) -> float:
        """s of a module without an α tensor.

        Raises:
            UnknownScale: no α is known, and no scale was given.
            Refusal: what the file says does not fit the factors.
            SourceError: it is unusable.
        """
        for factor in (self._of_diffusers(module, rank), self._of_kohya(convolution, rank), self._beside(module, rank)):
            if factor is not None:
                self.told.append(module)
                return factor
        if self.ledger.scale is None and self._has_convention(module):
            self.folded.append(module)
            return 1.0
        if self.ledger.scale is None:
            raise UnknownScale(
                f"{self._looked(module)}, so α/r is unknown: pass scale= (--scale), which is 1 if it was trained with "
                "α = r"
            )
        self.taken.append(module)
        return self.ledger.scale

    def parts(self, module: str, rank: int) -> tuple[int, str]:
        """How many parts of a fused projection the factors of a module join, and what to say of it.

        kohya's `split_qkv` trains factors of rank r for each part with s = α/r and saves them as one pair of rank 3r or
        4r with the α of one part. The header decides whether a file is one of those.

        Raises:
            Refusal: the header says so, and its rank does not fit.
        """
        if not _FUSED.search(module):
            return 1, ""
        dim = self._network_dim
        count = rank // dim if dim and rank in (3 * dim, 4 * dim) else 1
        if str(self._network_arguments.get("split_qkv")).lower() == "true":
            if count == 1:
                raise Refusal(
                    f"the header says split_qkv and r = {dim}, of which the factors' rank {rank} is no multiple"
                )
            return count, f"s = α/{dim}, as trained: the header says split_qkv, so rank {rank} is that of {count} parts"
        if count == 1:
            return 1, ""
        return 1, (
            f"s = α/{rank}, as ComfyUI reads it. The header's rank is {dim}: if this was trained with split_qkv, "
            f"ΔW is {count} times as large"
        )

    def _has_convention(self, module: str) -> bool:
        """Whether the layout itself says that no α means s = 1: a component before the path, no α in all of the file.

        ComfyUI's loader and diffusers' take such factors as they are, and the tools that write them (extractions,
        merged and converted LoRAs) put the scale into the factors. A flat name without its α has lost it, a path
        without a component may be any trainer's, and beside modules with an α one without has lost its own.
        """
        said = any(key in self._notes for key in ("lora_adapter_metadata", "ss_network_alpha", "ss_network_dim"))
        stored = any(name.endswith(".alpha") for name in self.ledger.tuned.tensors)
        return components.in_image_model(module) and not said and not stored

    def say(self) -> None:
        """Warnings on what became of the user's scale, and on modules without an α."""
        ledger, scale = self.ledger, self.ledger.scale
        if self.folded:
            ledger.warnings.append(
                f"no α for {_listed(self.folded)} s = 1, as ComfyUI and diffusers read files of this layout; "
                "pass scale= (--scale) if yours was trained otherwise"
            )
        if scale is None:
            return
        if self.taken:
            ledger.warnings.append(f"s = {scale:g} as given for {_listed(self.taken)} without an α")
        if self.told:
            ledger.warnings.append(f"scale was ignored for {_listed(self.told)} with an α")
        if not self.taken and not self.told:
            ledger.warnings.append("scale was ignored: nothing is left to scale")

    @property
    def _notes(self) -> Mapping[str, str]:
        return self.ledger.tuned.metadata

    @cached_property
    def _network_arguments(self) -> Mapping[str, Any]:
        try:
            arguments = json.loads(self._notes.get("ss_network_args", "{}"))
        except (ValueError, RecursionError):
            return {}
        return arguments if isinstance(arguments, Mapping) else {}

    @property
    def _network_dim(self) -> int | None:
        text = self._notes.get("ss_network_dim", "")
        return int(text) if text.isdecimal() and 0 < len(text) < 10 and int(text) else None

    @cached_property
    def _header_configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Component → its LoRA config; "" for a config that names no component.

        Raises:
            SourceError: it is not an object.
        """
        text = self._notes.get("lora_adapter_metadata")
        if text is None:
            return {}
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise SourceError(
                f"{self.ledger.where}: lora_adapter_metadata in the header is not a JSON object; save it again"
            )
        configs: dict[str, dict[str, Any]] = {}
        for key, value in content.items():
            if isinstance(value, dict) and "lora_alpha" in value:
                configs[str(key)] = value
            else:
                component, _, option = str(key).rpartition(".")
                configs.setdefault(component, {})[option] = value
        return {component: options for component, options in configs.items() if "lora_alpha" in options}

    def _of_diffusers(self, module: str, rank: int) -> float | None:
        """From the LoRA config in the header, if it is that of the module's component."""
        component, path = components.split(module)
        options = self._header_configs.get(component)
        if options is None and self._one_component:
            options = self._header_configs.get("")
        return None if options is None else self._scaling(options, path, rank, "the header")

    @cached_property
    def _one_component(self) -> bool:
        """Whether all modules belong to one component, so that a config without one can only be its."""
        return len({components.of_flat(module)[0] or components.split(module)[0] for module in self.modules}) == 1

    def _of_kohya(self, convolution: bool, rank: int) -> float | None:
        """From kohya's header; a convolution's α stands apart, and is that of the others for LyCORIS alone."""
        alpha: object = self._notes.get("ss_network_alpha")
        if convolution:
            own = alpha if "lycoris" in self._notes.get("ss_network_module", "") else None
            alpha = self._network_arguments.get("conv_alpha", own)
        if alpha is None or str(alpha).strip().lower() in _UNSAID:
            return None
        by_block = [key for key in self._network_arguments if str(key).endswith("alphas")]
        if by_block:
            raise Refusal(f"the header has {by_block[0]}, an α per block, and the module has no α of its own")
        if not convolution and self._network_dim not in (None, rank):
            raise Refusal(f"the header says r = {self._network_dim} (ss_network_dim), the factors have {rank}")
        return _number(alpha, self.ledger.where) / rank

    def _beside(self, module: str, rank: int) -> float | None:
        """From a config beside the file, `adapter_config.json` or `config.json`, or an object in it."""
        component, path = components.split(module)
        for name, content in (
            ("adapter_config.json", self.ledger.tuned.adapter_config),
            ("config.json", self.ledger.tuned.config),
        ):
            options = _lora_options(content or {}, component)
            if options is not None:
                return self._scaling({"r": rank, **options}, path, rank, name)
        return None

    def _scaling(self, options: Mapping[str, Any], path: str, rank: int, where: str) -> float:
        if options.get("alpha_pattern") and "." not in path:
            raise Refusal(f"{where} has an alpha_pattern of dotted names, and the file's are flat")
        s, configured = Config(options, self.ledger.where).scaling(path)
        if configured != rank:
            raise Refusal(f"{where} says r = {configured} for {path}, the factors have {rank}")
        return s

    def _looked(self, module: str) -> str:
        """What was looked at for an α, and found without one."""
        others = sorted(filter(None, self._header_configs))
        if others and components.split(module)[0] not in others:
            own = components.split(module)[0] or "a module without a component"
            return f"no α is stored, and the config in the header is for {', '.join(others)}, not for {own}"
        return "no α is stored: no tensor, nothing in the header, and no config beside the file has one"


def _lora_options(content: Mapping[str, Any], component: str, depth: int = 2) -> Mapping[str, Any] | None:
    """The object of a config that says α, under PEFT's names for α and r: the whole, or the one inside that does."""
    alpha = next((key for key in _ALPHA_KEYS if key in content), None)
    rank = next((key for key in _RANK_KEYS if key in content), None)
    if alpha is not None and (rank is not None or alpha != "alpha"):  # alpha alone may be anything
        return {**content, "lora_alpha": content[alpha], **({"r": content[rank]} if rank else {})}
    objects = {key: value for key, value in content.items() if isinstance(value, Mapping)} if depth else {}
    inner = {key: _lora_options(value, component, depth - 1) for key, value in objects.items()}
    of_components = {key: options for key, options in inner.items() if options is not None}
    return of_components.get(component) or (next(iter(of_components.values())) if len(of_components) == 1 else None)


def _listed(modules: list[str]) -> str:
    return f"{len(modules)} modules, such as {modules[0]}," if len(modules) > 1 else modules[0]


def _number(text: object, where: str) -> float:
    """α of the header as a finite number.

    Raises:
        SourceError: it is none.
    """
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SourceError(f"{where}: the α of the header is {text!r}, not a finite number; save the file again")
    return value
