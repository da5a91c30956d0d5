"""LoRA and LyCORIS files of kohya's trainers: one file, no config beside it, flat names.

A module is named by its path with underscores for dots, `lora_unet_down_blocks_0_….lora_down.weight`; which dots
they were only the base tells. s is in a tensor α of each module, or α is in the header.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.matrices import as_matrix
from spectra.sources.adapter import Refusal, Slots
from spectra.sources.formats import lycoris
from spectra.sources.ledger import Ledger

_FLAT = re.compile(rf"(?:lora|lycoris)_\w+\.(?:lora_(?:down|up|mid)\.weight|{lycoris.NAMES})")
# What stands before a flat name, and what may stand before the path in the base, pipelines and single files.
_COMPONENTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_unet_", ("unet.", "transformer.", "model.diffusion_model.", "diffusion_model.", "")),
    ("lora_transformer_", ("transformer.", "model.diffusion_model.", "diffusion_model.", "")),
    ("lora_prior_", ("prior.", "")),
    ("lora_te1_", ("text_encoder.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.", "")),
    ("lora_te2_", ("text_encoder_2.", "conditioner.embedders.1.", "text_encoders.clip_g.transformer.", "")),
    ("lora_te3_", ("text_encoder_3.", "text_encoders.t5xxl.transformer.", "")),
    ("lora_te_", ("text_encoder.", "cond_stage_model.transformer.", "")),
    ("lycoris_", ("", "unet.", "transformer.", "model.diffusion_model.", "diffusion_model.", "text_encoder.")),
)


def matches(folder: Folder) -> bool:
    """Flat names with underscores, and no config that says otherwise."""
    return folder.adapter_config is None and any(_FLAT.fullmatch(name) for name in folder.tensors)


def read(ledger: Ledger) -> None:
    """Enter every module; its name becomes the base's where there is one.

    Raises:
        SourceError: no name is one of the base, or the header's α is no number.
        BaseRequiredError: a module has a `dora_scale`, and there is no base.
    """
    modules = lycoris.grouped(ledger, _parted)
    lycoris.add(ledger, modules, _resolved(ledger, modules), partial(_scale, ledger))
    lycoris.say_scale(ledger, modules, header="ss_network_alpha" in ledger.tuned.metadata)


def _parted(name: str) -> lycoris.Part | None:
    """A flat name has one dot that counts, the first."""
    module, dot, suffix = name.partition(".")
    return lycoris.Part(module, module, lycoris.slot(suffix)) if dot else None


def _resolved(ledger: Ledger, modules: Mapping[str, Slots]) -> dict[str, str]:
    """Flat module → the weight's name in the base; without one, the flat name itself.

    Raises:
        SourceError: no module is in the base.
    """
    if ledger.base is None:
        ledger.warnings.append(
            "names are the file's own, with underscores for dots: pass base= (--base) to have the weights'"
        )
        return {module: f"{module}.weight" for module in modules}
    by_flat: dict[str, list[str]] = {}
    for name, ref in ledger.base.tensors.items():
        if name.endswith(".weight") and len(ref.shape) >= 2:
            by_flat.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)
    claimed: dict[str, list[str]] = {}
    for module, slots in modules.items():
        found = _candidates(module, by_flat)
        fitting = [name for name in found if len(found) == 1 or _fits(slots, ledger.base.tensors[name])]
        if len(fitting) == 1:
            claimed.setdefault(fitting[0], []).append(module)
        elif found:
            why = f"the flat name can be {' or '.join(found)}, and {len(fitting)} of them have the factors' shape"
            ledger.refuse(f"{module}.weight", (), "unsupported", why)
        else:
            ledger.tuned_only[f"{module}.weight"] = "not in the base"
    if modules and not claimed and not ledger.unsupported:
        raise SourceError(
            f"no module of {ledger.where}, such as {next(iter(modules))!r}, is in {ledger.base.path}; "
            "is base= (--base) the model that was tuned, in the layout that the trainer used?"
        )
    return _of_one_each(ledger, claimed)


def _of_one_each(ledger: Ledger, claimed: Mapping[str, list[str]]) -> dict[str, str]:
    """Module → weight; a weight that several modules claim has no number, as none of them is all of its ΔW."""
    names: dict[str, str] = {}
    for name, claimants in claimed.items():
        if len(claimants) == 1:
            names[claimants[0]] = name
        else:
            ledger.refuse(name, (), "unsupported", f"{' and '.join(claimants)} all stand for this weight")
    return names


def _candidates(module: str, by_flat: Mapping[str, list[str]]) -> list[str]:
    """The base's weights that a flat name can stand for, by the first component that has any."""
    for start, places in _COMPONENTS:
        if module.startswith(start):
            path = module.removeprefix(start)
            found = [
                name
                for place in places
                for name in by_flat.get(place.replace(".", "_") + path, ())
                if name.startswith(place)
            ]
            return list(dict.fromkeys(found))
    return []


def _fits(slots: Slots, weight: TensorRef) -> bool:
    """Whether a module's update has a weight's shape."""
    try:
        update = lycoris.build(Slots({name: ref for name, ref in slots.items() if name != "alpha"}), float)
    except Refusal:
        return False
    return update.shape == as_matrix(weight).shape


def _scale(ledger: Ledger, module: str, convolution: bool, rank: int) -> float:
    """s of a module without a stored α: the header's α over r, what the user says, or 1."""
    notes = ledger.tuned.metadata
    alpha = notes.get("ss_network_alpha")
    if convolution:
        alpha = _network_arguments(notes).get("conv_alpha", alpha)
    if alpha is not None:
        return _number(alpha, ledger.where) / rank
    return 1.0 if ledger.scale is None else ledger.scale


def _network_arguments(notes: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        found = json.loads(notes.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


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
