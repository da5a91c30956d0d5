"""What an adapter's file holds beside its modules: biases, weights that are saved whole, and what no rule knows.

The last is the reason for this file: one tensor of a module that nobody understood, and the module has no number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import SAVED_WHOLE
from spectra.files.folder import Folder
from spectra.models import tied
from spectra.models.pairing import unwrap
from spectra.naming import is_factor, role_of
from spectra.sources.difference import subtract
from spectra.sources.dump import is_dump
from spectra.sources.ledger import Ledger
from spectra.sources.targets import Target, align_file, saved_name, saves_whole

# Words in the names of what adapters add to a layer. In a dump of a whole model some of them are the model's own.
_ADAPTER_WORD = re.compile(
    r"lora|adapter|latent|magnitude|rout(?:er?|ing)(?:\b|_)|mask|scal(?:e|es|er|ing)(?:\b|_)|gating"
)

_WRAPPER = ".base_model.model."


def account_for_rest(ledger: Ledger) -> None:
    """Give every tensor of the file that no recipe reads and no reader has named its line; refuse what is unknown."""
    for name, why in ledger.tuned.broken.items():
        if name not in ledger.owners:
            ledger.refuse(name, (), "unreadable", why)
    unnamed = [name for name in ledger.tuned.tensors if name not in ledger.named]
    lost = [name for name in ledger.tuned.broken if name not in ledger.owners]
    if not unnamed and not lost:
        return
    used = ledger.stored_names(ref for delta in ledger.deltas if delta.recipe for ref in delta.recipe.refs)
    rest = [name for name in unnamed if name not in used]
    strays = _strays(ledger, [*rest, *lost], used)
    biases = [name for name in rest if name not in strays and name.endswith(".bias")]
    ledger.skipped.update(dict.fromkeys(map(unwrap, biases), "a bias, not a matrix"))
    for name in rest:
        if name not in strays and name not in biases and name not in ledger.owners:
            _add_saved(ledger, name)
    for name, modules in strays.items():
        for module in modules:
            _refuse_module(ledger, name, module)


def is_unknown_part(name: str) -> bool:
    """Whether a tensor that no rule knows is called as a part of an adapter is."""
    return is_factor(name) or _ADAPTER_WORD.search(unwrap(name)) is not None


def _strays(ledger: Ledger, rest: Iterable[str], used: set[str]) -> dict[str, list[str]]:
    """Tensors that belong to modules with an update, or lie above them, and have no part in it → the modules."""
    done = {ledger.owners[name] for name in used if name in ledger.owners}
    adapted = sorted(set(ledger.owners.values()), key=len, reverse=True)
    dumped = is_dump(ledger.tuned)
    strays = {}
    for name in rest:
        if name in ledger.owners:
            if ledger.owners[name] in done:
                strays[name] = [ledger.owners[name]]
            continue
        bare = unwrap(name)
        module = next((m for m in adapted if bare.startswith(m) and bare[len(m) : len(m) + 1] in (".", "_")), None)
        if module is not None:
            if not _of_the_model(ledger, name, bare.removeprefix(module)):
                strays[name] = [module]
        elif _acts_on_others(ledger, name, dumped):
            below = _below(bare, adapted)
            if below:
                strays[name] = below
    return strays


def _of_the_model(ledger: Ledger, name: str, rest: str) -> bool:
    """Whether what follows a module's name is a parameter of the layer itself, or the bias beside a known weight."""
    if rest in (".weight", ".bias", ".base_layer.weight", ".base_layer.bias"):
        return True
    return rest.endswith(".bias") and f"{name.removesuffix('bias')}weight" in ledger.tuned.tensors


def _acts_on_others(ledger: Ledger, name: str, dumped: bool) -> bool:
    """Whether a tensor outside all modules may be a part of their updates, rather than a weight of the model."""
    clean = saved_name(name)
    base = ledger.base.tensors if ledger.base else {}
    if saves_whole(ledger, clean) or ledger.base_names.get(clean, clean) in base or ".original_module." in name:
        return False
    if dumped or ledger.tuned.adapter_config is None or _outside(ledger, name):
        return is_factor(name) if dumped else is_unknown_part(name)
    return is_unknown_part(name) or not clean.endswith((".weight", ".bias"))


def _below(bare: str, adapted: list[str]) -> list[str]:
    """The adapted modules under the innermost module that a tensor lies in and that has any."""
    path = bare
    while path:
        path = path.rpartition(".")[0]
        below = [module for module in adapted if not path or module.startswith(f"{path}.")]
        if below:
            return below
    return []


def _refuse_module(ledger: Ledger, stored: str, module: str) -> None:
    """Take back every number of a module of which one tensor is not understood."""
    bare, ref = unwrap(stored), ledger.tuned.tensors.get(stored)
    size = "(which cannot be read)" if ref is None else str(list(ref.shape))
    own = f"{bare.removeprefix(module).lstrip('._')} {size} of {module}"
    what = own if bare.startswith(module) else f"{bare} {size}, above {module},"
    why = f"{what} is no part of {ledger.title} that is known, so what it does to ΔW is not known either"
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
    """A tensor that an adapter saves whole (`modules_to_save`, or all in a dump): new values, so ΔW = saved − base."""
    ref, clean = ledger.tuned.tensors[stored], saved_name(stored)
    if len(ref.shape) < 2:
        ledger.skipped[clean] = "a vector, not a matrix"
    elif ".original_module." in stored:
        ledger.skipped[clean] = "the original that PEFT keeps beside what is saved whole"
    elif stored in ledger.tuned.same:
        ledger.skipped[clean] = f"the same tensor as {unwrap(ledger.tuned.same[stored])}, and reported as that"
    elif not _saved_whole(ledger, clean) and not (_outside(ledger, stored) and not is_factor(clean)):
        why = (
            f"no part of {ledger.title} that is known, and no weight that modules_to_save in adapter_config.json names"
        )
        ledger.refuse(clean, ref.shape, "unsupported", why)
    elif ledger.base is None and ledger.config.get("layer_replication"):
        ledger.refuse(clean, ref.shape, "unsupported", "saved whole, and with layer_replication the base is not used")
    elif ledger.base is None:
        ledger.skipped[clean] = SAVED_WHOLE
    else:
        _subtract_saved(ledger, ledger.base, stored, clean)


def _outside(ledger: Ledger, stored: str) -> bool:
    """Whether PEFT wraps one part of the model only, and a tensor lies outside it: the config does not speak of it."""
    return _WRAPPER not in f".{stored}" and any(_WRAPPER in name for name in ledger.tuned.tensors)


def _saved_whole(ledger: Ledger, clean: str) -> bool:
    """Whether a weight counts as saved whole: all do in a dump, or without a config; else what the config names."""
    if is_factor(clean):
        return False
    by_token = tied.is_vocabulary(clean) or role_of(clean) in ("embed_tokens", "lm_head")
    anything = ledger.tuned.adapter_config is None or is_dump(ledger.tuned)
    return anything or by_token or saves_whole(ledger, clean)


def _saves(ledger: Ledger, name: str) -> bool:
    """Whether the file has a value of its own for a weight of the base."""
    stored = map(saved_name, ledger.tuned.tensors)
    return any(ledger.base_names.get(clean, clean) == name for clean in stored)


def _subtract_saved(ledger: Ledger, base: Folder, stored: str, clean: str) -> None:
    shapes = {key: item.shape for key, item in base.tensors.items()}
    name = (ledger.base_names or align_file(ledger, {}, shapes))[clean]
    held = name if name in base.tensors else tied.stored_as(name, base.tensors, base.same, base.config_of(name))
    if any(delta.name == name for delta in ledger.deltas):
        ledger.skipped[clean] = "the weight that an update is listed for"
        return
    if held is None or (held != name and not tied.may_be(name, ledger.tuned.tensors[stored].shape, shapes[held])):
        ledger.tuned_only[clean] = "saved whole, and not in the base"
        return
    if held != name and ledger.config.get("ensure_weight_tying") is True and _saves(ledger, held):
        ledger.skipped[clean] = f"tied to {held} (ensure_weight_tying in adapter_config.json), and reported as that"
        return
    config = base.config_of(held)
    saved, original = (Target.of(held, ref, config) for ref in (ledger.tuned.tensors[stored], base.tensors[held]))
    assert saved.ref is not None
    subtract(ledger, name, saved.ref, original, config)
