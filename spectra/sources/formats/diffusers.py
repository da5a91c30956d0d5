"""LoRA files of image models under dotted names: `unet.down_blocks.0.….lora_A.weight`, one file, no config beside it.

diffusers puts its config, if any, into the header. ComfyUI's names and those of older versions of diffusers, which
kept factors in attention processors, are read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.models.pairing import unwrap
from spectra.sources.adapter import Refusal
from spectra.sources.config import Config
from spectra.sources.formats import lycoris
from spectra.sources.ledger import Ledger

_NAMES = (
    r"lora_[AB]\.weight|lora_(?:down|up|mid)\.weight|lora\.(?:down|up)\.weight|lora_linear_layer\.(?:down|up)\.weight"
    rf"|lora_magnitude_vector(?:\.weight)?|{lycoris.NAMES}"
)
_DOTTED = re.compile(
    r"(?P<module>(?:unet|text_encoder(?:_\d)?|prior|transformer(?:_\d)?|diffusion_model|te\d?)\..+?"
    rf"|.+\.processor\.to_(?:q|k|v|out)_lora)\.(?P<suffix>(?:down|up)\.weight|{_NAMES})"
)
# GPT-2 and kin call their body "transformer", too; these are the children of the ones in image models.
_IMAGE_TRANSFORMER = re.compile(r"transformer(?:_\d)?\.(?:\w*blocks|layers|\w*embed\w*|proj_out|norm_out|caption\w*)\.")
_PROCESSOR = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora$")
_ENCODER_WORDS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_UNET_WORDS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def matches(folder: Folder) -> bool:
    """Factors under the names of a pipeline's components, and no config beside them."""
    return folder.adapter_config is None and any(_of_an_image_model(name) for name in folder.tensors)


def _of_an_image_model(name: str) -> bool:
    found = _DOTTED.fullmatch(unwrap(name))
    if not found or found["suffix"] in ("alpha", "dora_scale", "diff", "diff_b"):  # names that others use as well
        return False
    return not found["module"].startswith("transformer") or bool(_IMAGE_TRANSFORMER.match(found["module"] + "."))


def read(ledger: Ledger) -> None:
    """Enter every module; α comes from the header's config, a tensor, or is r.

    Raises:
        SourceError: the header's config is unusable.
        BaseRequiredError: a module has a DoRA magnitude, and there is no base.
    """
    configs = _header_configs(ledger)
    modules = lycoris.grouped(ledger, _parted)
    names = {module: f"{module}.weight" for module in modules}
    lycoris.add(ledger, modules, names, partial(_scale, ledger, configs))
    lycoris.say_scale(ledger, modules, header=bool(configs))


def _parted(name: str) -> lycoris.Part | None:
    """A dotted name's path, its module in the base's words, and slot."""
    found = _DOTTED.fullmatch(unwrap(name))
    if not found:
        return None
    path, suffix = found["module"], found["suffix"]
    old = _PROCESSOR.search(path)
    if old is None:
        return lycoris.Part(path, path, lycoris.slot(suffix))
    words = _ENCODER_WORDS if path.startswith("text_encoder") else _UNET_WORDS
    whole = suffix if suffix.startswith("l") else f"lora.{suffix}"
    return lycoris.Part(path, f"{path[: old.start()]}.{words[old[1]]}", lycoris.slot(whole))


def _header_configs(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """Component → its LoRA config, which diffusers writes into the header with the component before each key.

    Raises:
        SourceError: it is not an object.
    """
    text = ledger.tuned.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise SourceError(f"{ledger.where}: lora_adapter_metadata in the header is not a JSON object; save it again")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, _, option = str(key).partition(".")
        configs.setdefault(component, {})[option] = value
    return configs


def _scale(
    ledger: Ledger, configs: Mapping[str, Mapping[str, Any]], module: str, convolution: bool, rank: int
) -> float:
    """s of a module without a stored α: from its component's config, what the user says, or 1 as diffusers reads it."""
    component, _, path = module.partition(".")
    if component not in configs:
        return 1.0 if ledger.scale is None else ledger.scale
    s, configured = Config(configs[component], ledger.where).scaling(path)
    if configured != rank:
        raise Refusal(f"the header says r = {configured} for {path}, the factors have {rank}")
    return s
