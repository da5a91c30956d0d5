"""LoRA as LitGPT saves it, `lit_model.pth.lora`: the query, key and value of a layer share one pair of tensors.

ΔW = s·B·A with `lora_A` (r, in), `lora_B` (out, r) and s = lora_alpha / lora_r of hyperparameters.yaml. For
`attn.qkv`, A stacks the r rows of each of q, k and v that was trained and B their rows, each with r columns; the config
says which these are (`lora_query`, `lora_key`, `lora_value`). Settled by Lightning-AI/litgpt, litgpt/lora.py
(`LoRAQKVLinear`) and litgpt/finetune/lora.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from spectra.deltas.recipes import Term
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.models import litgpt_names
from spectra.models.architectures import Cut, stacked
from spectra.models.litgpt_names import Heads, Place
from spectra.models.pairing import unwrap
from spectra.sources.adapter import Refusal, Slots, add_factored
from spectra.sources.ledger import Ledger
from spectra.sources.parts import Part, add_parts
from spectra.sources.targets import Target, targets, weight_targets

_SWITCHES = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}
_FACTOR = re.compile(
    r"transformer\.h\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:experts\.\d+\.)?(?:fc|fc_1|fc_2|proj|gate))\.lora_[AB]"
)


def matches(folder: Folder) -> bool:
    """Factors that are parameters of their own, of modules that only LitGPT calls so."""
    named = (unwrap(name) for name in folder.tensors)
    return any(_FACTOR.fullmatch(name) for name in named) or "lora_query" in (folder.adapter_config or {})


def read(ledger: Ledger) -> None:
    """Enter every module's factors, those of q, k and v each on its own, under the base's names.

    Raises:
        SourceError: what s is does not follow from hyperparameters.yaml, and the user gave none.
    """
    s = _scale(ledger)
    base = ledger.base
    there = litgpt_names.listing((*base.tensors, *base.unusable)) if base else ""
    heads = litgpt_names.heads_of(ledger.tuned.config, base.config if base else {})
    whole: dict[str, Term] = {}
    parts: dict[str, dict[Place, Term]] = {}
    for module, slots in ledger.modules(r"(?P<slot>lora_[AB])").items():
        places = litgpt_names.places(there, module) if base else _own_places(module)
        with ledger.attempt(f"{_common(places)}.weight"):
            for part, term in _terms(ledger, module, slots, s, heads):
                place = places[part]
                if place.part:
                    parts.setdefault(place.module, {})[place] = term
                else:
                    whole[place.module] = term
    for module, target in targets(ledger, {module: term.shape for module, term in whole.items()}).items():
        add_factored(ledger, target, [whole[module]])
    for name, target in weight_targets(ledger, {f"{module}.weight": None for module in parts}).items():
        _add_parts(ledger, target, parts[name.removesuffix(".weight")], heads)


def _own_places(module: str) -> dict[str, Place]:
    """Where a module and its parts are where no base says otherwise."""
    return {part: Place(module, part) for part in "qkv"} if module.endswith(".attn.qkv") else {"": Place(module)}


def _common(places: Mapping[str, Place]) -> str:
    """What to call a module of which nothing can be said: the first of its places."""
    return next(iter(places.values())).module


def _scale(ledger: Ledger) -> float:
    """α/r of the hyperparameters, or what the user gives where there are none.

    Raises:
        SourceError: neither is there, or a number is unusable.
    """
    config = ledger.config
    if not config:
        if ledger.scale is None:
            raise SourceError(
                f"{ledger.where} holds {ledger.title} and has no hyperparameters.yaml beside it, so lora_alpha/lora_r "
                "is unknown: put it back or pass scale= (--scale), which is 2 with LitGPT's defaults"
            )
        return ledger.scale
    if ledger.scale is not None:
        ledger.warnings.append("scale was ignored: hyperparameters.yaml carries lora_alpha and lora_r")
    alpha, r = config.get("lora_alpha"), config.get("lora_r")
    real = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)
    if not real or type(r) is not int or r < 1:
        raise SourceError(f"{ledger.where}: hyperparameters.yaml says lora_alpha = {alpha!r}, lora_r = {r!r}; mend it")
    return float(alpha) / r  # type: ignore[arg-type]


def _terms(ledger: Ledger, module: str, slots: Slots, s: float, heads: Heads | None) -> Iterator[tuple[str, Term]]:
    """Part → product; "" is the whole module."""
    A, B = slots.real("lora_A", "lora_B")
    if len(A.shape) != 2 or len(B.shape) != 2 or not A.numel or not B.numel or A.shape[0] % B.shape[1]:
        raise Refusal(f"lora_A {list(A.shape)} and lora_B {list(B.shape)} of {module} cannot be multiplied")
    r = B.shape[1]
    said = ledger.config.get("lora_r", r)
    if said != r:
        raise Refusal(f"hyperparameters.yaml says lora_r = {said}, the factors of {module} have {r}")
    if not module.endswith(".attn.qkv"):
        if A.shape[0] != r:
            raise Refusal(f"lora_A {list(A.shape)} and lora_B {list(B.shape)} of {module} cannot be multiplied")
        yield "", Term((B,), A, s)
        return
    rows = _trained_rows(ledger, module, A.shape[0] // r, B.shape[0], heads)
    for place, (part, cut) in enumerate(stacked(rows).items()):
        yield part, Term((cut(B),), A.rows(place * r, (place + 1) * r), s)


def _trained_rows(ledger: Ledger, module: str, count: int, rows: int, heads: Heads | None) -> dict[str, int]:
    """How many rows of B belong to each of q, k and v that was trained, in this order."""
    config = ledger.config
    if config:
        trained = [part for part, switch in _SWITCHES.items() if config.get(switch) is True]
    elif count == len(_SWITCHES):
        trained = list(_SWITCHES)
    else:
        raise Refusal(
            f"{module} holds factors for {count} of q, k and v, and no hyperparameters.yaml beside {ledger.where} says "
            "for which"
        )
    if len(trained) != count:
        listed = ", ".join(trained) or "none"
        raise Refusal(f"hyperparameters.yaml says that of q, k and v was trained: {listed}; {module} has {count}")
    if heads is None:
        raise Refusal(
            f"which of the {rows} rows of {module} are q, k and v follows from the heads, and neither a "
            "model_config.yaml beside the file nor the base's config says how many there are"
        )
    wanted = {part: heads.rows[part] for part in trained}
    if sum(wanted.values()) != rows:
        raise Refusal(
            f"the heads of the config make {sum(wanted.values())} rows of {', '.join(trained)}, lora_B of {module} has "
            f"{rows}"
        )
    return wanted


def _add_parts(ledger: Ledger, target: Target, terms: Mapping[Place, Term], heads: Heads | None) -> None:
    """Enter the updates of parts of one fused weight."""
    rows = sum(heads.rows.values()) if heads else None
    if target.ref is not None:
        rows = target.ref.shape[0] if len(target.ref.shape) == 2 else 0
    with ledger.attempt(target.name):
        parts = {place.part: Part(term, _cut(place, rows, heads)) for place, term in terms.items()}
        add_parts(ledger, target, parts, rows)


def _cut(place: Place, rows: int | None, heads: Heads | None) -> Cut | None:
    """How to cut the part out of the weight; None where its rows are not known."""
    if rows is None:
        return None
    if place.part in ("gate", "up"):
        cuts = stacked({"gate": rows // 2, "up": rows - rows // 2})
    elif heads is None or sum(heads.rows.values()) != rows:
        raise Refusal(f"the base weight has {rows} rows, which are not the q, k and v of its config", "shape_mismatch")
    else:
        cuts = heads.cuts(grouped=place.grouped)
    return cuts[place.part]
