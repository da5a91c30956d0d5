"""What an adapter's file holds beside its modules: biases, weights that are saved whole, and what no rule knows.

The last is the reason for this file: one tensor of a module that nobody understood, and the module has no number.
"""

from __future__ import annotations

from collections.abc import Iterable

from spectra.deltas.delta import WeightDelta
from spectra.files.folder import Folder
from spectra.models import tied
from spectra.models.pairing import unwrap
from spectra.naming import role_of
from spectra.sources.difference import subtract
from spectra.sources.ledger import Ledger
from spectra.sources.targets import Target, align_file, saved_name, tied_to


def account_for_rest(ledger: Ledger) -> None:
    """Give every tensor of the file that no recipe reads and no reader has named its line; refuse what is unknown."""
    for name, why in ledger.tuned.broken.items():
        if name not in ledger.owners:
            ledger.refuse(name, (), "unreadable", why)
    used = ledger.stored_names(ref for delta in ledger.deltas if delta.recipe for ref in delta.recipe.refs)
    rest = [name for name in ledger.tuned.tensors if name not in used and name not in ledger.named]
    strays = _strays(ledger, rest, used)
    biases = [name for name in rest if name not in strays and name.endswith(".bias")]
    ledger.skipped.update(dict.fromkeys(map(unwrap, biases), "a bias, not a matrix"))
    for name in rest:
        if name not in strays and name not in biases and name not in ledger.owners:
            _add_saved(ledger, name)
    for name, module in strays.items():
        _refuse_module(ledger, name, module)


def _strays(ledger: Ledger, rest: Iterable[str], used: set[str]) -> dict[str, str]:
    """Tensors that belong to a module with an update, and have no part in it → the module."""
    done = {ledger.owners[name] for name in used if name in ledger.owners}
    adapted = sorted(set(ledger.owners.values()), key=len, reverse=True)
    found = {}
    for name in rest:
        if name in ledger.owners:
            if ledger.owners[name] in done:
                found[name] = ledger.owners[name]
            continue
        bare = unwrap(name)
        module = next((m for m in adapted if bare.startswith(m) and bare[len(m) : len(m) + 1] in (".", "_")), None)
        if module is not None and not _of_the_model(bare.removeprefix(module)):
            found[name] = module
    return found


def _of_the_model(rest: str) -> bool:
    """Whether what follows a module's name is a parameter of the layer itself rather than of an adapter on it."""
    return rest in (".weight", ".bias", ".base_layer.weight", ".base_layer.bias") or rest.endswith(".bias")


def _refuse_module(ledger: Ledger, stored: str, module: str) -> None:
    """Take back every number of a module of which one tensor is not understood."""
    what = unwrap(stored).removeprefix(module).lstrip("._")
    why = (
        f"{what} {list(ledger.tuned.tensors[stored].shape)} of {module} is no part of {ledger.title} that is known, so "
        "what it does to ΔW is not known either"
    )
    members = {name for name, owner in ledger.owners.items() if owner == module}
    refused = False
    for place, delta in enumerate(ledger.deltas):
        if delta.recipe is not None and members & ledger.stored_names(delta.recipe.refs):
            ledger.unsupported[delta.name] = why
            ledger.deltas[place] = WeightDelta.refused(delta.name, delta.shape, "unsupported", why)
            refused = True
    if not refused and not any(delta.name.startswith(module) for delta in ledger.deltas):
        ledger.refuse(f"{module}.weight", (), "unsupported", why)


def _add_saved(ledger: Ledger, stored: str) -> None:
    """A tensor that an adapter saves whole (`modules_to_save`): new values, so ΔW = saved − base."""
    ref, clean = ledger.tuned.tensors[stored], saved_name(stored)
    if len(ref.shape) < 2:
        ledger.skipped[clean] = "a vector, not a matrix"
    elif ".base_layer." in clean:
        ledger.skipped[clean] = "an unchanged copy of the base weight"
    elif not _saved_whole(ledger, clean):
        why = (
            f"no part of {ledger.title} that is known, and no weight that modules_to_save in adapter_config.json names"
        )
        ledger.refuse(clean, ref.shape, "unsupported", why)
    elif ledger.base is None:
        ledger.skipped[clean] = "saved whole, so ΔW needs the base weight: pass base= (--base)"
    else:
        _subtract_saved(ledger, ledger.base, stored, clean)


def _saved_whole(ledger: Ledger, clean: str) -> bool:
    """Whether a weight counts as saved whole: the config names it, it is a vocabulary's, or there is no config."""
    if (
        ledger.tuned.adapter_config is None
        or tied.is_vocabulary(clean)
        or role_of(clean) in ("embed_tokens", "lm_head")
    ):
        return True
    named = ledger.config.get("modules_to_save") or ()
    listed = [named] if isinstance(named, str) else [str(item) for item in named]
    module = clean.removesuffix(".weight")
    return any(module == item or module.endswith(f".{item}") or f".{item}." in f".{clean}" for item in listed)


def _subtract_saved(ledger: Ledger, base: Folder, stored: str, clean: str) -> None:
    shapes = {key: item.shape for key, item in base.tensors.items()}
    name = (ledger.base_names or align_file(ledger, {}, shapes))[clean]
    held = name if name in base.tensors else tied_to(base, name)
    if held is None:
        ledger.tuned_only[clean] = "saved whole, and not in the base"
        return
    config = base.config_of(held)
    saved, original = (Target.of(held, ref, config) for ref in (ledger.tuned.tensors[stored], base.tensors[held]))
    assert saved.ref is not None
    subtract(ledger, name, saved.ref, original, config)
