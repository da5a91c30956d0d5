"""LoRA files of image and video models under dotted names: `unet.down_blocks.0.….lora_A.weight`, one file.

diffusers puts its config, if any, into the header. ComfyUI's names, paths without a component, and the names of older
versions of diffusers, which kept factors in attention processors, are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from spectra.files.folder import Folder
from spectra.models.pairing import unwrap
from spectra.sources.formats import components, lycoris
from spectra.sources.ledger import Ledger
from spectra.sources.recognised import declared_type

_NAMES = (
    r"lora_[AB](?:\.default)?\.weight|lora_(?:down|up|mid)(?:\.default)?\.weight|lora\.(?:down|up)\.weight"
    rf"|lora_linear_layer\.(?:down|up)\.weight|lora_magnitude_vector(?:\.weight)?|{lycoris.NAMES}"
)
_DOTTED = re.compile(rf"(?P<module>.+?)\.(?P<suffix>{_NAMES})")
_IN_PROCESSOR = re.compile(r"(?P<module>.+\.(?:processor\.)?to_(?:q|k|v|out)_lora)\.(?P<suffix>(?:down|up)\.weight)")
_PROCESSOR = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora$")
_ENCODER_WORDS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_UNET_WORDS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_SHARED = re.compile(r"alpha|dora_scale|diff|diff_[bm]")  # suffixes that say nothing: others use them as well
_OF_PEFT = re.compile(r"lora_[AB](?:\.default)?\.weight|lora_magnitude_vector(?:\.weight)?")
_OF_LORA = re.compile(r"lora[._].*|(?:down|up)\.weight")


def matches(folder: Folder) -> bool:
    """Factors in words that PEFT does not use, or in its words where only such a file says α or has such components."""
    if declared_type(folder) not in (None, "LORA"):
        return False
    pairs = list(_found(folder))
    has_alpha = "lora_adapter_metadata" in folder.metadata or any(suffix == "alpha" for _, suffix in pairs)
    for module, suffix in pairs:
        if _SHARED.fullmatch(suffix):
            continue
        if not _OF_PEFT.fullmatch(suffix):
            if _OF_LORA.fullmatch(suffix) or has_alpha or _of_an_image_model(module):
                return True
        elif folder.adapter_config is None and (has_alpha or _of_an_image_model(module)):
            return True
    return False


def _found(folder: Folder) -> Iterator[tuple[str, str]]:
    """Module and suffix of every tensor that is named as a part of an adapter."""
    for name in folder.tensors:
        match = _match(name)
        if match:
            yield match["module"], match["suffix"]


def _match(name: str) -> re.Match[str] | None:
    bare = unwrap(name)
    return _IN_PROCESSOR.fullmatch(bare) or _DOTTED.fullmatch(bare)


def _of_an_image_model(module: str) -> bool:
    """Whether a module is in a component of an image model, or in an attention processor of one."""
    return components.in_image_model(module) or _PROCESSOR.search(module) is not None


def read(ledger: Ledger) -> None:
    """Enter every module.

    Raises:
        SourceError: the header's config is unusable, or no α is known.
        BaseRequiredError: a module has a DoRA magnitude, and there is no base.
    """
    modules = lycoris.grouped(ledger, parted)
    lycoris.add(ledger, modules, {module: f"{module}.weight" for module in modules})


def parted(name: str) -> lycoris.Part | None:
    """A dotted name's path, its module in the base's words, and slot; None if it is no part of an adapter."""
    match = _match(name)
    if not match:
        return None
    path, suffix = match["module"], match["suffix"].replace(".default", "")
    old = _PROCESSOR.search(path)
    if old is None:
        return lycoris.Part(path, path, lycoris.slot(suffix))
    words = _ENCODER_WORDS if path.startswith("text_encoder") else _UNET_WORDS
    whole = suffix if suffix.startswith("l") else f"lora.{suffix}"
    return lycoris.Part(path, f"{path[: old.start()]}.{words[old[1]]}", lycoris.slot(whole))
