"""LoRA and LyCORIS files of kohya's trainers: one file, no config beside it, flat names.

A module is named by its path with underscores for dots, `lora_unet_down_blocks_0_….lora_down.weight`; which dots
they were only the base tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.matrices import as_matrix
from spectra.sources.adapter import Refusal, Slots
from spectra.sources.formats import components, diffusers, lycoris
from spectra.sources.ledger import Ledger

_FLAT = re.compile(rf"(?:lora|lycoris)_\w+\.(?:lora_(?:down|up|mid)\.weight|{lycoris.NAMES})")

_STARTS_FLAT = re.compile(r"(?:lora|lycoris)_\w+\.")


def matches(folder: Folder) -> bool:
    """Flat names with underscores, whatever config lies beside them."""
    return any(_FLAT.fullmatch(name) for name in folder.tensors)


def read(ledger: Ledger) -> None:
    """Enter every module; its name becomes the base's where there is one.

    Raises:
        SourceError: no name is one of the base, or no α is known.
        BaseRequiredError: a module has a `dora_scale`, and there is no base.
    """
    modules = lycoris.grouped(ledger, _parted)
    lycoris.add(ledger, modules, _resolved(ledger, modules))


def _parted(name: str) -> lycoris.Part | None:
    """A flat name has one dot that counts, the first; dotted names may stand beside flat ones."""
    if not _STARTS_FLAT.match(name):
        return diffusers.parted(name)
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
    dotted = {module: f"{module}.weight" for module in modules if "." in module}
    by_flat: dict[str, list[str]] = {}
    for name, ref in ledger.base.tensors.items():
        if name.endswith(".weight") and len(ref.shape) >= 2:
            by_flat.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)
    claimed: dict[str, list[str]] = {}
    for module, slots in modules.items():
        if module in dotted:
            continue
        candidates = _candidates(module, by_flat)
        fitting = [name for name in candidates if len(candidates) == 1 or _fits(slots, ledger.base.tensors[name])]
        if len(fitting) == 1:
            claimed.setdefault(fitting[0], []).append(module)
        elif candidates:
            why = f"the flat name can be {' or '.join(candidates)}, and {len(fitting)} of them have the factors' shape"
            ledger.refuse(f"{module}.weight", (), "unsupported", why)
        else:
            ledger.lack(f"{module}.weight", "not in the base")
    if modules and not claimed and not dotted and not ledger.unsupported:
        raise SourceError(
            f"no module of {ledger.where}, such as {next(iter(modules))!r}, is in {ledger.base.path}; "
            "is base= (--base) the model that was tuned, in the layout that the trainer used?"
        )
    return {**dotted, **_of_one_each(ledger, claimed)}


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
    """The base's weights that a flat name can stand for."""
    start, places = components.of_flat(module)
    path = module.removeprefix(start)
    paths = [
        name for place in places for name in by_flat.get(place.replace(".", "_") + path, ()) if name.startswith(place)
    ]
    return list(dict.fromkeys(paths))


def _fits(slots: Slots, weight: TensorRef) -> bool:
    """Whether a module's update has a weight's shape."""
    try:
        update = lycoris.build(Slots({name: ref for name, ref in slots.items() if name != "alpha"}), float)
    except Refusal:
        return False
    return update.shape == as_matrix(weight).shape
