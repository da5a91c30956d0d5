"""The components of image and video models: what LoRA files and bases put before a module's path.

One U-Net is `lora_unet_…` for kohya, `unet.…` for diffusers and `diffusion_model.…` for ComfyUI, in a pipeline's folder
`unet.…` and in a single file `model.diffusion_model.…`. A component goes to one place of the base as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from spectra.errors import SourceError
from spectra.sources.ledger import Ledger

_DENOISER = ("unet.", "transformer.", "transformer_2.", "model.diffusion_model.", "diffusion_model.", "")
_CLIP_L = (
    "text_encoder.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.",
    "cond_stage_model.transformer.", "",
)  # fmt: skip
_CLIP_G = ("text_encoder_2.", "conditioner.embedders.1.", "text_encoders.clip_g.transformer.")
_T5 = ("text_encoder_3.", "text_encoder_2.", "text_encoders.t5xxl.transformer.")


@dataclass(frozen=True)
class Component:
    """One component.

    Attributes:
        flat: what kohya's names of its modules start with.
        dotted: what dotted names start with.
        places: what may stand before a path in the base, pipelines and single files; "" for the component's own file.
    """

    flat: tuple[str, ...]
    dotted: tuple[str, ...]
    places: tuple[str, ...]


_COMPONENTS = (
    Component(("lora_unet_",), ("unet.", "diffusion_model.", "model.diffusion_model."), _DENOISER),
    Component(("lora_transformer_",), ("transformer.", "transformer_2."), _DENOISER),
    Component(("lora_prior_",), ("prior.",), ("prior.", "")),
    Component(
        ("lora_te1_", "lora_te_"), ("text_encoder.", "text_encoders.clip_l.transformer.", "te.", "te1."), _CLIP_L
    ),
    Component(("lora_te2_",), ("text_encoder_2.", "te2."), (*_CLIP_G, _T5[-1], "")),  # T5 in files for Flux
    Component((), ("text_encoders.clip_g.transformer.",), (*_CLIP_G, "")),
    Component(("lora_te3_",), ("text_encoder_3.", "text_encoders.t5xxl.transformer.", "te3."), (*_T5, "")),
    Component(("lycoris_",), (), ("", *_DENOISER[:-1], "text_encoder.")),
)  # fmt: skip
_OTHER_ENCODER = re.compile(r"(text_encoders\.[^.]+\.(?:transformer\.)?)")
_ENCODERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "")
# GPT-2 and kin call their body "transformer", too; these are the children of the ones in image models.
_IMAGE_TRANSFORMER = re.compile(r"(?:\w*blocks|layers|\w*embed\w*|proj_out|norm_out|caption\w*)\.")


def split(module: str) -> tuple[str, str]:
    """A dotted module's component as its name has it, "" if it has none, and the path in it.

    >>> split("text_encoders.clip_l.transformer.text_model.final"), split("transformer_blocks.0.attn.to_q")
    (('text_encoders.clip_l.transformer', 'text_model.final'), ('', 'transformer_blocks.0.attn.to_q'))
    """
    starts = (start for component in _COMPONENTS for start in component.dotted if module.startswith(start))
    start = max(starts, key=len, default="")
    other = _OTHER_ENCODER.match(module)
    start = start or (other[1] if other else "")
    return start.removesuffix("."), module.removeprefix(start)


def in_image_model(module: str) -> bool:
    """Whether a dotted module is in a component of an image model; GPT-2 and kin call their body "transformer", too.

    >>> in_image_model("transformer.transformer_blocks.0.proj"), in_image_model("transformer.h.0.attn.c_attn")
    (True, False)
    """
    component, path = split(module)
    if component.startswith("transformer"):
        return _IMAGE_TRANSFORMER.match(path + ".") is not None
    return component != ""


def of_flat(module: str) -> tuple[str, tuple[str, ...]]:
    """What a flat name starts with, and the places in a base where the rest may be; none for an unknown start.

    >>> of_flat("lora_prior_blocks_0")
    ('lora_prior_', ('prior.', ''))
    """
    for component in _COMPONENTS:
        for start in component.flat:
            if module.startswith(start):
                return start, component.places
    return "", ()


def names_in_base(ledger: Ledger, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Weight's name in the file → in the base: each component goes to the place where most of its weights fit.

    Names of a component that fits nowhere stay as they are.

    Raises:
        SourceError: a component fits two places of the base equally well.
    """
    names = {name: name for name in shapes}
    if ledger.base is None:
        return names
    held = {name: (ref.shape[0], math.prod(ref.shape[1:])) for name, ref in ledger.base.tensors.items() if ref.shape}
    groups: dict[str, dict[str, str]] = {}
    for name in shapes:
        component, path = split(name)
        groups.setdefault(f"{component}." if component else "", {})[name] = path
    for start, group in groups.items():
        wanted = {path: shapes[name] for name, path in group.items()}
        scores = {place: _fitting(held, place, wanted) for place in (start, *_places(start))}
        best = max(scores.values())
        chosen = [place for place, score in scores.items() if score == best and best]
        if not chosen or start in chosen:
            continue
        if len(chosen) > 1:
            raise SourceError(
                f"{ledger.where}: {_said(start)} fits {' and '.join(map(repr, chosen))} of the base equally well; pass "
                "the folder of the one that was trained as base= (--base)"
            )
        place = f"{chosen[0]!r} in the base" if chosen[0] else "the base itself"
        ledger.warnings.append(f"{_said(start)} is {place}")
        names.update({name: chosen[0] + path for name, path in group.items()})
    return names


def _fitting(held: Mapping[str, tuple[int, int]], place: str, wanted: Mapping[str, tuple[int, int]]) -> int:
    """How many of the paths are weights of the wanted shape at a place."""
    return sum(held.get(place + path) == shape for path, shape in wanted.items())


def _places(start: str) -> tuple[str, ...]:
    for component in _COMPONENTS:
        if start in component.dotted:
            return component.places
    return _ENCODERS if start.startswith("text_encoders.") else (*_DENOISER, "prior.")


def _said(start: str) -> str:
    return f"what the file calls {start!r}" if start else "what has no component in the file's names"
