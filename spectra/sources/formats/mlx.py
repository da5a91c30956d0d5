"""LoRA and DoRA as MLX trains them: the factors lie the other way round, and s is a number of its own.

ΔW = s·(a·b)ᵀ with a (in, r) and b (r, out); of an embedding s·a·b, (vocabulary, dim); of stacked experts
s·bₑ·aₑ with a (experts, r, in), b (experts, out, r). DoRA adds `m`, one magnitude per row. Settled by
ml-explore/mlx-lm, mlx_lm/tuner/lora.py and dora.py (`fuse`), and Blaizzy/mlx-vlm, mlx_vlm/trainer/lora.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from spectra.deltas.recipes import Factors, Term
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.models import tied
from spectra.models.matrices import Weight, weights_of
from spectra.sources.adapter import Refusal, Slots, Target, add_factored, add_update
from spectra.sources.formats.dora import Dora, misfit
from spectra.sources.ledger import Ledger
from spectra.sources.targets import align_file, targets

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<slot>lora_a|A)")
_SECOND = {"lora_a": "lora_b", "A": "B"}
_EXPERTS = re.compile(r"(?P<before>.*\.)(?:switch_mlp|experts)\.(?P<part>gate_proj|up_proj|down_proj)")


def matches(folder: Folder) -> bool:
    """Factors `lora_a` and `lora_b` that are parameters of their own, or mlx-vlm's `A` and `B`."""
    for name in folder.tensors:
        match = _FACTOR.fullmatch(name)
        if match and not match["module"].endswith(".weight"):
            other = f"{match['module']}.{_SECOND[match['slot']]}"
            if match["slot"] == "lora_a" or other in folder.unusable or other in folder.tensors:
                return True
    return False


def read(ledger: Ledger) -> None:
    """Enter every module's factors, and every expert's.

    Raises:
        SourceError: what s is does not follow from the config.
        BaseRequiredError: there are magnitudes and no base.
    """
    modules = ledger.modules(r"(?P<slot>lora_[ab]|[ABm])")
    if any("m" in slots for slots in modules.values()):
        ledger.need_base()
    s = _scale(ledger)
    terms: dict[str, Term] = {}
    for module, slots in modules.items():
        with ledger.attempt(f"{module}.weight"):
            experts = _term(ledger, module, slots, s)
            if isinstance(experts, Term):
                terms[module] = experts
            else:
                _add_experts(ledger, module, experts)
    for module, target in targets(ledger, {module: term.shape for module, term in terms.items()}).items():
        with ledger.attempt(target.name, terms[module].shape):
            _add(ledger, target, terms[module], modules[module])


def _scale(ledger: Ledger) -> float:
    """What the trainer that wrote the config multiplied the factors with.

    mlx-lm uses `lora_parameters.scale` alone since June 2024 and multiplied it with α/r before. Configs of
    that time say `lora_layers` for today's `num_layers`, and had no `use_dora` until two weeks before the change
    (ml-explore/mlx-examples, commits 2bd64b78, 42458914, c457a3f8, 50e5ca81); until 2025 an α without a
    meaning was written. mlx-vlm took α alone before April 2026 and α/r after (Blaizzy/mlx-vlm, 6b0ad8f0).

    Raises:
        SourceError: the config leaves several possibilities, and the user gave no s.
    """
    possible = _possible_scales(ledger.config)
    if ledger.scale is not None:
        if len(possible) == 1:
            ledger.warnings.append("scale was ignored: adapter_config.json carries it")
        else:
            return ledger.scale
    if len(possible) == 1:
        return possible[0]
    if ledger.tuned.adapter_config is None:
        why = "has no adapter_config.json beside it, so its scale is unknown"
    elif possible:
        listed = " or ".join(f"{s:g}" for s in possible)
        why = f"its adapter_config.json has an alpha that some versions applied and others did not: {listed}"
    else:
        why = "its adapter_config.json has no lora_parameters.scale that is a finite number"
    raise SourceError(f"{ledger.where} holds {ledger.title}, and {why}: pass scale= (--scale), the factor of a·b")


def _possible_scales(config: Mapping[str, Any]) -> list[float]:
    """Every s that the config may mean, one where it is certain."""
    options = config.get("lora_parameters")
    if isinstance(options, Mapping):
        scale, ratio = _number(options.get("scale")), _ratio(options)
        if scale is None:
            return []
        if ratio is None or "num_layers" in config or "fine_tune_type" in config:
            return [scale]
        if "lora_layers" in config and "use_dora" not in config:
            return [scale * ratio]
        return sorted({scale, scale * ratio})
    alpha, ratio = _number(config.get("alpha")), _ratio(config)
    return [] if alpha is None or ratio is None else sorted({alpha, ratio})


def _ratio(options: Mapping[str, Any]) -> float | None:
    """α/r, or None where one of them is not there."""
    alpha, rank = _number(options.get("alpha")), _number(options.get("rank"))
    return alpha / rank if alpha is not None and rank else None


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]


def _term(ledger: Ledger, module: str, slots: Slots, s: float) -> Term | list[Term]:
    """The product of one module's factors in Linear orientation; one for each expert where they are stacked."""
    a, b = slots.real("A", "B") if "A" in slots or "B" in slots else slots.real("lora_a", "lora_b")
    stacked = len(a.shape) == len(b.shape) == 3
    fits = a.shape[:2] == (b.shape[0], b.shape[2]) if stacked else a.shape[1:] == b.shape[:1]
    if not fits or not (stacked or len(a.shape) == len(b.shape) == 2) or not a.numel or not b.numel:
        raise Refusal(f"lora_a {list(a.shape)} and lora_b {list(b.shape)} of {module} cannot be multiplied")
    said, rank = _configured_rank(ledger.config), a.shape[1]
    if said is not None and said != rank:
        raise Refusal(f"the config says rank = {said} for {module}, the factors in {ledger.where} have {rank}")
    _check_magnitude(ledger.config, module, slots, stacked=stacked)
    if stacked:
        return [Term((b.item(index),), a.item(index), s) for index in range(a.shape[0])]
    return Term((a,), b, s) if tied.is_embedding(f"{module}.weight") else Term((b.T,), a.T, s)


def _configured_rank(config: Mapping[str, Any]) -> object:
    options = config.get("lora_parameters", config)
    return options.get("rank") if isinstance(options, Mapping) else None


def _check_magnitude(config: Mapping[str, Any], module: str, slots: Slots, *, stacked: bool) -> None:
    """Refuse a magnitude that the config does not announce, and the reverse."""
    claimed = config.get("fine_tune_type") == "dora" or bool(config.get("use_dora"))
    there = "m" in slots
    if there and stacked:
        raise Refusal(f"a DoRA magnitude of stacked experts ({module}) is not known")
    if config and claimed != there and not stacked:
        raise Refusal(
            f"the config says {'DoRA' if claimed else 'LoRA'}, and m of {module} {'is' if there else 'is not'} there"
        )


def _add(ledger: Ledger, target: Target, term: Term, slots: Slots) -> None:
    if "m" not in slots:
        add_factored(ledger, target, [term])
        return
    if target.real is None:
        raise Refusal("DoRA needs the base weight as real numbers")
    why = misfit(slots["m"], term.shape, "rows")
    if why:
        raise Refusal(why)
    add_update(ledger, target, Dora(target.real, Factors((term,)), slots["m"], "rows"))


def _add_experts(ledger: Ledger, module: str, terms: list[Term]) -> None:
    """Enter the ΔW of every expert of a stack, under the name that the base has for it."""
    for index, (target, term) in enumerate(zip(_expert_targets(ledger, module, terms), terms, strict=True)):
        if target is None:
            ledger.tuned_only[f"{module}.weight[{index}]"] = "not in the base"
            ledger.use((*term.lefts, term.right))
        elif target.ref is not None and target.ref.shape != term.shape:
            why = f"the update is {list(term.shape)}, the base weight {list(target.ref.shape)}"
            ledger.refuse(target.name, term.shape, "shape_mismatch", why)
        else:
            add_factored(ledger, target, [term], whole=True)


def _expert_targets(ledger: Ledger, module: str, terms: list[Term]) -> Iterator[Target | None]:
    """Which matrix of the base each expert is, whether the base keeps them apart, stacked, or fused with others."""
    if ledger.base is None:
        yield from (Target(f"{module}.weight[{index}]") for index in range(len(terms)))
        return
    held = weights_of(ledger.base, ledger.base, split_experts=True)
    match = _EXPERTS.fullmatch(module)
    keys = [_key(match, module, index) for index in range(len(terms))]
    shapes = {key: weight.shape for key, weight in held.items()}
    names = align_file(ledger, {key: term.shape for key, term in zip(keys, terms, strict=True)}, shapes)
    for key in keys:
        yield _target(held.get(names[key]))


def _key(match: re.Match[str] | None, module: str, index: int) -> str:
    """What layouts of experts share: `….experts.3.gate_proj.weight`."""
    return f"{match['before']}experts.{index}.{match['part']}.weight" if match else f"{module}.weight[{index}]"


def _target(weight: Weight | None) -> Target | None:
    return None if weight is None else Target(weight.name, weight.ref, weight.stored)
