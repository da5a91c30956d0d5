"""LoRA and DoRA under torchtune's own names, whose query and key rows lie in Meta's order for LLaMA and kin.

ΔW = s·b·a with a (r, in), b (out, r), s = α/r; α is in the recipe and, where torchtune wrote one, in
adapter_config.json. DoRA adds `magnitude` (out,). Settled by pytorch/torchtune, torchtune/modules/peft/lora.py
and dora.py; the names and which models' rows are reordered by torchtune/models/convert_weights.py,
qwen2/_convert_weights.py and gemma2/_convert_weights.py.
"""

from __future__ import annotations

import re

from spectra.deltas.recipes import Factors, Term
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.architectures import model_type
from spectra.models.meta_names import in_transformers_order
from spectra.sources.adapter import Refusal, Slots, add_factored, add_update
from spectra.sources.formats.dora import Dora, misfit
from spectra.sources.ledger import Ledger
from spectra.sources.targets import targets

_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_MODULE = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, _NAMES))})")
_IN_METAS_ORDER = frozenset({"llama", "mistral", "gemma", "gemma2"})
_AS_STORED = frozenset({"qwen2", "qwen3"})


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
    own = ledger.base is not None and any(_MODULE.search(name) for name in ledger.base.tensors)
    terms: dict[str, Term] = {}
    magnitudes: dict[str, TensorRef] = {}
    for module, slots in modules.items():
        name = module if own else transformers_module(module)
        with ledger.attempt(f"{name}.weight"):
            heads = None if own else _heads(ledger.base, name)
            terms[name] = _term(ledger, module, slots, heads)
            if "magnitude" in slots:
                magnitudes[name] = _magnitude(slots, terms[name], heads)
    for name, target in targets(ledger, {name: term.shape for name, term in terms.items()}).items():
        with ledger.attempt(target.name, terms[name].shape):
            if name not in magnitudes:
                add_factored(ledger, target, [terms[name]], note=_note(ledger, name))
            elif target.real is None:
                raise Refusal("DoRA needs the base weight as real numbers")
            else:
                add_update(ledger, target, Dora(target.real, Factors((terms[name],)), magnitudes[name], "rows"))


def transformers_module(module: str) -> str:
    """What transformers calls a module of torchtune's decoder; other modules keep their names.

    >>> transformers_module("layers.3.mlp.w2"), transformers_module("output")
    ('model.layers.3.mlp.down_proj', 'lm_head')
    """
    found = _MODULE.fullmatch(module)
    if found:
        return f"model.layers.{found[1]}.{_NAMES[found[2]]}"
    return {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}.get(module, module)


def _heads(base: Folder | None, name: str) -> int | None:
    """How many heads' rows are to be reordered; None for rows that are as transformers has them, or without a base."""
    if base is None or not name.endswith((".q_proj", ".k_proj")):
        return None
    config = base.config_of(name)
    kind = model_type(config, name)
    if kind in _AS_STORED:
        return None
    if kind not in _IN_METAS_ORDER:
        raise Refusal(
            f"whether torchtune reorders the rows of q and k is not known for model_type {kind!r} of the base"
        )
    heads = config.get("num_attention_heads")
    if name.endswith(".k_proj"):
        heads = config.get("num_key_value_heads", heads)
    if type(heads) is not int or heads < 1:
        raise Refusal("the base's config.json does not say how many heads there are, which the order of rows takes")
    return heads


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
    if heads is None:
        return ref
    if ref.shape[0] % (2 * heads):
        raise Refusal(f"the {ref.shape[0]} rows of {ref.name} are not {heads} heads, as the base's config.json says")
    return in_transformers_order(ref, heads)


def _note(ledger: Ledger, name: str) -> str:
    loose = ledger.base is None and name.endswith((".q_proj", ".k_proj"))
    return "rows in torchtune's order: without a base it is not known whether transformers has another" if loose else ""
