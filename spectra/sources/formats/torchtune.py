"""LoRA and DoRA under torchtune's own names, whose query and key rows lie in Meta's order for LLaMA and kin.

ΔW = s·b·a with a (r, in), b (out, r), s = α/r; α is in the recipe and, where torchtune wrote one, in
adapter_config.json. DoRA adds `magnitude` (out,). Settled by pytorch/torchtune, torchtune/modules/peft/lora.py
and dora.py; `models/torchtune_names.py` has the names and which models' rows are reordered.
"""

from __future__ import annotations

from collections.abc import Mapping

from spectra.deltas.recipes import Factors, Term
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import architectures, torchtune_names
from spectra.sources.adapter import Refusal, Slots, add_factored, add_update
from spectra.sources.formats.dora import Dora, misfit
from spectra.sources.ledger import Ledger
from spectra.sources.parts import Part, add_parts
from spectra.sources.targets import targets, weight_targets


def matches(folder: Folder) -> bool:
    """Factors that are modules of their own, `lora_a.weight`."""
    return any(name.endswith(".lora_a.weight") for name in folder.tensors)


def read(ledger: Ledger) -> None:
    """Enter every module's factors under the base's names, in the base's order of rows.

    Raises:
        BaseRequiredError: there are magnitudes and no base.
    """
    modules = ledger.modules(r"(?P<slot>lora_[ab](?=\.weight$)|magnitude)(?:\.weight)?")
    if any("magnitude" in slots for slots in modules.values()):
        ledger.need_base()
    own = ledger.base is not None and torchtune_names.speaks(ledger.base.tensors)
    terms: dict[str, Term] = {}
    magnitudes: dict[str, TensorRef] = {}
    for module, slots in modules.items():
        name = module if own else torchtune_names.transformers_module(module)
        with ledger.attempt(f"{name}.weight"):
            heads = None if own else _heads(ledger.base, name)
            terms[name] = _term(ledger, module, slots, heads)
            if "magnitude" in slots:
                magnitudes[name] = _magnitude(slots, terms[name], heads)
    _add_fused(ledger, terms, magnitudes)
    for name, target in targets(ledger, {name: term.shape for name, term in terms.items()}).items():
        with ledger.attempt(target.name, terms[name].shape):
            if name not in magnitudes:
                add_factored(ledger, target, [terms[name]], note=_note(ledger, name))
            elif target.real is None:
                raise Refusal("DoRA needs the base weight as real numbers")
            else:
                add_update(ledger, target, Dora(target.real, Factors((terms[name],)), magnitudes[name], "rows"))


def _add_fused(ledger: Ledger, terms: dict[str, Term], magnitudes: Mapping[str, TensorRef]) -> None:
    """Enter those that the base fuses, and take them out of the terms."""
    fused: dict[str, dict[str, Part]] = {}
    for name in list(terms) if ledger.base is not None else ():
        module = torchtune_names.fused_module(name)
        ref = ledger.base.tensors.get(f"{module[0]}.weight") if module and ledger.base else None
        if module is None or ref is None or len(ref.shape) != 2:
            continue
        term, weight = terms.pop(name), f"{module[0]}.weight"
        cuts = architectures.parts(ledger.base.config_of(weight), weight, ref.shape[0]) if ledger.base else {}
        with ledger.attempt(f"{weight}[{module[1]}]", term.shape):
            if name in magnitudes:
                raise Refusal(f"DoRA of {module[1]} alone, which the base fuses into {weight}, is not read")
            if module[1] not in cuts:
                raise Refusal(f"which rows of {weight} are {module[1]} does not follow from the base's config.json")
            fused.setdefault(weight, {})[module[1]] = Part(term, cuts[module[1]])
    for weight, target in weight_targets(ledger, dict.fromkeys(fused)).items():
        add_parts(ledger, target, fused[weight], target.ref.shape[0] if target.ref is not None else None)


def _heads(base: Folder | None, name: str) -> int | None:
    """How many heads' rows are to be reordered; None for rows that are as transformers has them, or without a base."""
    if base is None:
        return None
    try:
        return torchtune_names.heads_to_reorder(base.config_of(name), name)
    except SourceError as problem:
        raise Refusal(str(problem)) from None


def _term(ledger: Ledger, module: str, slots: Slots, heads: int | None) -> Term:
    if not {"lora_a", "lora_b"} <= set(slots):
        raise Refusal(f"{'lora_b' if 'lora_a' in slots else 'lora_a'} of {module} is missing in {ledger.where}")
    a, b = slots.real("lora_a", "lora_b")
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0]:
        raise Refusal(f"lora_a {list(a.shape)} and lora_b {list(b.shape)} of {module} cannot be multiplied")
    if ledger.config.get("use_dora") and "magnitude" not in slots:
        raise Refusal(f"the config says use_dora, and the magnitude of {module} is missing in {ledger.where}")
    return Term((_reordered(b, heads),), a, ledger.scale_of(module, a.shape[0]))


def _magnitude(slots: Slots, term: Term, heads: int | None) -> TensorRef:
    why = misfit(slots["magnitude"], term.shape, "rows")
    if why:
        raise Refusal(why)
    return _reordered(slots["magnitude"].reshape(term.shape[0], 1), heads)


def _reordered(ref: TensorRef, heads: int | None) -> TensorRef:
    """Rows in transformers' order."""
    try:
        return torchtune_names.reordered(ref, heads)
    except SourceError as problem:
        raise Refusal(str(problem)) from None


def _note(ledger: Ledger, name: str) -> str:
    loose = ledger.base is None and name.endswith((".q_proj", ".k_proj"))
    return "rows in torchtune's order: without a base it is not known whether transformers has another" if loose else ""
