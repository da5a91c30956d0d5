"""LoRA and LyCORIS files of the image-generation trainers: one file, no config beside it.

kohya and LyCORIS name modules by their path with underscores for dots, `lora_unet_down_blocks_0_….lora_down.weight`;
which dots they were only the base tells. diffusers keeps the dots, `unet.down_blocks.0.….lora_A.weight`, and puts
its config, if any, into the header.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from spectra.deltas.recipes import Update
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.matrices import as_matrix
from spectra.models.pairing import unwrap
from spectra.sources.adapter import Slots, add_update, need_base, refuse_heads, weight_targets
from spectra.sources.formats import lycoris
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import scaling

KIND = "kohya"
KIND_DIFFUSERS = "diffusers"
_LYCORIS_SLOT = (
    r"hada_[wt][12](?:_[ab])?|lokr_w[12](?:_[ab])?|lokr_t2|alpha|dora_scale|diff|diff_b|w_norm|b_norm"
    r"|oft_diag|oft_blocks|on_input"
)
_FLAT = re.compile(rf"(?:lora|lycoris)_\w+\.(?:lora_(?:down|up|mid)\.weight|{_LYCORIS_SLOT})")
_DOTTED_SLOT = (
    r"lora_[AB]\.weight|lora_(?:down|up|mid)\.weight|lora\.(?:down|up)\.weight|lora_linear_layer\.(?:down|up)\.weight"
    rf"|lora_magnitude_vector(?:\.weight)?|{_LYCORIS_SLOT}"
)
_DOTTED = re.compile(
    r"(?P<module>(?:unet|text_encoder(?:_\d)?|prior|transformer(?:_\d)?|diffusion_model|te\d?)\..+?"
    rf"|.+\.processor\.to_(?:q|k|v|out)_lora)\.(?P<suffix>(?:down|up)\.weight|{_DOTTED_SLOT})"
)
# GPT-2 and kin call their body "transformer", too; these are the children of the ones in image models.
_IMAGE_TRANSFORMER = re.compile(r"transformer(?:_\d)?\.(?:\w*blocks|layers|\w*embed\w*|proj_out|norm_out|caption\w*)\.")
_PROCESSOR = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora$")
_ENCODER_WORDS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_UNET_WORDS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
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


def matches_diffusers(folder: Folder) -> bool:
    """Factors under the names of a pipeline's components, and no config beside them."""
    return folder.adapter_config is None and any(_dotted(name) for name in folder.tensors)


def _dotted(name: str) -> re.Match[str] | None:
    found = _DOTTED.fullmatch(unwrap(name))
    if found and found["module"].startswith("transformer") and not _IMAGE_TRANSFORMER.match(found["module"] + "."):
        return None
    only_here = found and (found["suffix"] not in ("alpha", "dora_scale", "diff", "diff_b"))
    return found if only_here else None


def open_kohya(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module of a flat file; its names become the base's where there is one.

    Raises:
        SourceError: no name is one of the base, or the header's α is no number.
        BaseRequiredError: a module has a `dora_scale`, and there is no base.
    """
    ledger = Ledger(tuned, base)
    refuse_heads(ledger, heads)
    modules = _grouped(ledger, lambda name: tuple(name.split(".", 1)) if "." in name else None)
    names = _resolved(ledger, modules)
    _add(ledger, modules, names, partial(_scale_flat, tuned, scale), split)
    _say_scale(ledger, modules, scale, "ss_network_alpha" in tuned.metadata)
    return ledger.source(KIND)


def open_diffusers(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module of a file with dotted names; α comes from the header's config, a tensor, or is r.

    Raises:
        SourceError: the header's config is unusable.
        BaseRequiredError: a module has a DoRA magnitude, and there is no base.
    """
    ledger = Ledger(tuned, base)
    refuse_heads(ledger, heads)
    configs = _header_configs(tuned)
    modules = _grouped(ledger, _parted)
    names = {module: f"{module}.weight" for module in modules}
    _add(ledger, modules, names, partial(_scale_dotted, tuned, configs, scale), split)
    _say_scale(ledger, modules, scale, bool(configs))
    return ledger.source(KIND_DIFFUSERS)


def _parted(name: str) -> tuple[str, ...] | None:
    """A dotted name's module, in the base's words, and suffix."""
    found = _DOTTED.fullmatch(unwrap(name))
    if not found:
        return None
    module, suffix = found["module"], found["suffix"]
    old = _PROCESSOR.search(module)
    if old:
        words = _ENCODER_WORDS if module.startswith("text_encoder") else _UNET_WORDS
        return f"{module[: old.start()]}.{words[old[1]]}", f"lora.{suffix}" if not suffix.startswith("l") else suffix
    return module, suffix


def _grouped(ledger: Ledger, part: Callable[[str], tuple[str, ...] | None]) -> dict[str, Slots]:
    """module → slot → reference; what is no part of a module, or cannot be read, is accounted for."""
    modules: dict[str, Slots] = {}
    for name, ref in ledger.tuned.tensors.items():
        found = part(name)
        if found is None:
            ledger.skipped[name] = "no part of an adapter that is known"
        elif lycoris.is_vector(lycoris.slot(found[1])):
            ledger.skipped[name] = "the change of a bias or a norm, not a matrix"
        else:
            modules.setdefault(found[0], {})[lycoris.slot(found[1])] = ref
    for name, why in ledger.tuned.broken.items():
        found = part(name)
        modules.pop(found[0] if found else "", None)
        ledger.refuse(f"{found[0]}.weight" if found else name, (), "unreadable", why)
    return modules


def _add(
    ledger: Ledger,
    modules: Mapping[str, Slots],
    names: Mapping[str, str],
    scale_of: Callable[[str, bool, int], float | str],
    split: bool,
) -> None:
    """Enter the modules under their weights' names; one that has none was accounted for when names were looked up."""
    updates: dict[str, tuple[Update, TensorRef | None]] = {}
    for module, name in names.items():
        slots = modules[module]
        update = lycoris.build(slots, partial(scale_of, module, _is_convolution(slots)))
        if isinstance(update, str):
            ledger.refuse(name, (), "unsupported", f"{module}: {update}")
        elif name in updates:
            ledger.refuse(name, update.shape, "unsupported", f"{module} is another module's weight, too")
        else:
            updates[name] = (update, slots.get("dora_scale"))
    if any(magnitude is not None for _, magnitude in updates.values()):
        need_base(ledger, "DoRA")
    for name, target in weight_targets(ledger, {name: update.shape for name, (update, _) in updates.items()}).items():
        update, magnitude = updates[name]
        if magnitude is None:
            add_update(ledger, target, update, split=split)
            continue
        base = ledger.base.tensors.get(target.name) if ledger.base else None
        if base is None or target.ref is None or not target.ref.is_float:
            ledger.refuse(target.name, update.shape, "unsupported", "DoRA needs the base weight as real numbers")
            continue
        changed = lycoris.rescaled(update, magnitude, target.ref, base.shape[1])
        if isinstance(changed, str):
            ledger.refuse(target.name, update.shape, "unsupported", changed)
        else:
            add_update(ledger, target, changed, split=split)


def _is_convolution(slots: Slots) -> bool:
    down = slots.get("down")
    return "mid" in slots or (down is not None and math.prod(down.shape[2:]) > 1)


def _resolved(ledger: Ledger, modules: Mapping[str, Slots]) -> dict[str, str]:
    """Flat module → the weight's name in the base; without one, the flat name itself.

    Raises:
        SourceError: no module is in the base.
    """
    if ledger.base is None:
        ledger.warnings.append("names are the file's own, with underscores for dots: pass --base to have the weights'")
        return {module: f"{module}.weight" for module in modules}
    by_flat: dict[str, list[str]] = {}
    for name, ref in ledger.base.tensors.items():
        if name.endswith(".weight") and len(ref.shape) >= 2:
            by_flat.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)
    names: dict[str, str] = {}
    for module, slots in modules.items():
        found = _candidates(module, by_flat)
        fitting = [name for name in found if len(found) == 1 or _fits(slots, ledger.base.tensors[name])]
        if len(fitting) == 1:
            names[module] = fitting[0]
        elif found:
            why = f"the flat name can be {' or '.join(found)}, and {len(fitting)} of them have the factors' shape"
            ledger.refuse(f"{module}.weight", (), "unsupported", why)
        else:
            ledger.tuned_only[f"{module}.weight"] = "not in the base"
    if modules and not names and not ledger.unsupported:
        raise SourceError(
            f"no module of {ledger.tuned.path}, such as {next(iter(modules))!r}, is in {ledger.base.path}; "
            "is --base the model that was tuned, in the layout that the trainer used?"
        )
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
    update = lycoris.build({name: ref for name, ref in slots.items() if name != "alpha"}, float)
    return not isinstance(update, str) and update.shape == as_matrix(weight).shape


def _scale_flat(tuned: Folder, given: float | None, module: str, convolution: bool, rank: int) -> float | str:
    """s of a module without a stored α: the header's α over r, what the user says, or 1."""
    notes = tuned.metadata
    alpha = notes.get("ss_network_alpha")
    if convolution:
        alpha = _network_arguments(tuned).get("conv_alpha", alpha)
    if alpha is not None:
        return _number(alpha, "the α of the header", tuned) / rank
    return 1.0 if given is None else given


def _network_arguments(tuned: Folder) -> Mapping[str, Any]:
    try:
        found = json.loads(tuned.metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _number(text: object, what: str, tuned: Folder) -> float:
    """A finite number from a header.

    Raises:
        SourceError: it is none.
    """
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SourceError(f"{tuned.path}: {what} is {text!r}, not a finite number; save the file again")
    return value


def _header_configs(tuned: Folder) -> dict[str, dict[str, Any]]:
    """Component → its LoRA config, which diffusers writes into the header with the component before each key.

    Raises:
        SourceError: it is not an object.
    """
    text = tuned.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise SourceError(f"{tuned.path}: lora_adapter_metadata in the header is not a JSON object; save it again")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, _, option = str(key).partition(".")
        configs.setdefault(component, {})[option] = value
    return configs


def _scale_dotted(
    tuned: Folder,
    configs: Mapping[str, Mapping[str, Any]],
    given: float | None,
    module: str,
    convolution: bool,
    rank: int,
) -> float | str:
    """s of a module without a stored α: from its component's config, what the user says, or 1 as diffusers reads it."""
    component, _, path = module.partition(".")
    if component in configs:
        s, configured = scaling(configs[component], path, str(tuned.path))
        return s if configured == rank else f"the header says r = {configured} for {path}, the factors have {rank}"
    return 1.0 if given is None else given


def _say_scale(ledger: Ledger, modules: Mapping[str, Slots], given: float | None, header: bool) -> None:
    """Warnings on where s came from, where that is not a stored α."""
    bare = [module for module, slots in modules.items() if "alpha" not in slots and slots.keys() != {"diff"}]
    if bare and not header and given is None:
        ledger.warnings.append(f"{len(bare)} modules, such as {bare[0]}, store no α: s = 1 was taken, or pass --scale")
    if given is not None and (header or not bare):
        ledger.warnings.append("scale was ignored where the file says α")
