"""LoRA as PEFT saves it: ΔW = s·B·A per module, and what PEFT builds on the same factors.

Linear layers, convolutions, embeddings and `nn.MultiheadAttention`; DoRA, KaSA, MoSLoRA, block-diagonal factors;
stacked experts (experts.py); initialisations that changed the base (residual.py).
References: Hu et al. 2021, §4.1 (LoRA); the variants' own files name theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spectra.deltas.recipes import Factors, Term, Update
from spectra.deltas.source import Source
from spectra.errors import SourceError, UnsupportedFormatError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import architectures
from spectra.models.matrices import as_matrix
from spectra.sources.adapter import (
    Slots,
    Target,
    add_factored,
    add_rest,
    add_update,
    modules_of,
    need_base,
    refuse_heads,
    slot_pattern,
    unusable,
    weight_targets,
)
from spectra.sources.formats import dora, lora_experts
from spectra.sources.formats.residual import FromOriginal, Method
from spectra.sources.formats.trainable_tokens import add_tokens
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import scaling

KIND = "lora"
KIND_DORA = "dora"
_SLOTS = slot_pattern("lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_diag|lora_AB")
# Options under which the same names mean something else, or no one ΔW exists.
_NOT_PLAIN = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA): it acts on the tokens after its invocation only",
    "arrow_config": "an Arrow router: it mixes other adapters anew for every token",
    "use_qalora": "a QA-LoRA: its A acts on pooled inputs of a GPTQ base",
}
# Initialisations after which the base is no longer the original one, and what they left.
_CHANGED_BASE = {
    "pissa": "the residual base", "olora": "the residual base", "corda": "the residual base",
    "lora_ga": "the residual base", "loftq": "the quantised base",
}  # fmt: skip
_TRAINING_ONLY = ("lora_monteclora_sampler", "lora_velora_embed")


@dataclass(frozen=True)
class _Module:
    """One module's factors.

    Attributes:
        term: s·B·A in Linear orientation.
        embedding: whether the weight is an embedding (vocabulary, dim), which initialisations leave alone.
        magnitude: DoRA's, or None.
        note: what is peculiar about it.
    """

    term: Term
    embedding: bool = False
    magnitude: TensorRef | None = None
    note: str = ""


def matches(folder: Folder) -> bool:
    """Factors named lora_A / lora_B, and a config that does not claim to be something else."""
    declared = str((folder.adapter_config or {}).get("peft_type", "LORA"))
    named = any(".lora_A" in name or ".lora_embedding_A" in name for name in folder.tensors)
    return named and declared == "LORA"


def matches_dora(folder: Folder) -> bool:
    """LoRA factors with magnitudes."""
    return matches(folder) and any("lora_magnitude_vector" in name for name in folder.tensors)


def open_lora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module's factors and scale.

    Raises:
        SourceError: the config is missing or unusable, or no module is complete.
        BaseRequiredError: a module is a DoRA and there is no base.
    """
    if tuned.adapter_config is None and scale is None:
        raise SourceError(
            f"{tuned.path} has LoRA factors but no adapter_config.json beside it, so α/r is unknown: "
            "put the config back or pass --scale"
        )
    config = tuned.adapter_config or {}
    for option, what in _NOT_PLAIN.items():
        if config.get(option):
            raise UnsupportedFormatError(f"{tuned.path} holds {what}; there is no one ΔW to analyse")
    ledger = Ledger(tuned, base)
    refuse_heads(ledger, heads)
    if scale is not None and tuned.adapter_config is not None:
        ledger.warnings.append("scale was ignored: adapter_config.json carries α and r")
    if config.get("layer_replication") and base is not None:
        ledger.base = None
        ledger.warnings.append("layer_replication: names are those of the enlarged model, and the base was not used")
    groups, rest = modules_of(ledger, _SLOTS)
    stacks = {module: slots for module, slots in groups.items() if lora_experts.parameters_of(config, module)}
    found: dict[str, _Module] = {}
    for module in groups:
        if module not in stacks:
            name, item = _read(config, module, groups, scale, str(tuned.path))
            if isinstance(item, str):
                ledger.refuse(name, (), "unsupported", item)
            else:
                found[name] = item
    if any(item.magnitude is not None for item in found.values()):
        need_base(ledger, "DoRA")
    _add_modules(ledger, config, found, split)
    lora_experts.add_stacks(ledger, config, stacks, split=split)
    rest = add_tokens(ledger, rest)
    idle = [name for name in rest if any(word in name for word in _TRAINING_ONLY)]
    ledger.skipped.update(dict.fromkeys(idle, "used while training only"))
    add_rest(ledger, [name for name in rest if name not in idle], split=split)
    return ledger.source(KIND_DORA if matches_dora(tuned) else KIND)


def _read(
    config: Mapping[str, Any], module: str, modules: Mapping[str, Slots], scale: float | None, where: str
) -> tuple[str, _Module | str]:
    """The name of a module's weight in the model, and its factors or why there are none.

    PEFT wraps `nn.MultiheadAttention` as a whole: the factors of the input weight, which has a name of its
    own, are those of the wrapper. The output projection's lie inside it, and PEFT (0.21 and before) adds
    them twice, in every forward pass as in the merge: so did the training.
    """
    owner, inside = lora_experts.owner_of(module), ".base_layer.out_proj"
    if f"{module}{inside}" in modules:
        return f"{owner}.in_proj_weight", _module(config, owner, modules[module], scale, where)
    around = module.removesuffix(inside)
    if around == module or around not in modules:
        return f"{owner}.weight", _module(config, owner, modules[module], scale, where)
    item = _module(config, lora_experts.owner_of(around), modules[module], scale, where)
    if not isinstance(item, str):
        note = "twice s·B·A, as PEFT applies it to the output projection of nn.MultiheadAttention"
        item = replace(item, term=replace(item.term, scale=2 * item.term.scale), note=note)
    return f"{owner}.weight", item


def _module(config: Mapping[str, Any], module: str, slots: Slots, scale: float | None, where: str) -> _Module | str:
    """The factors of one module in Linear orientation, or why there are none."""
    embedding = "lora_embedding_A" in slots or "lora_embedding_B" in slots
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [name for name in names if name not in slots]
    if missing:
        return f"{missing[0]} of {module} is missing in {where}"
    why = unusable(slots, names)
    if why:
        return f"{module}: {why}"
    down, up = (slots[name] for name in names)
    blocks = _block_diagonal(config, module, down, up)
    if isinstance(blocks, str):
        return blocks
    down, up = blocks
    if len(down.shape) < 2 or len(up.shape) < 2 or up.shape[1] != down.shape[0]:
        return f"lora_A {list(down.shape)} and lora_B {list(up.shape)} of {module} cannot be multiplied"
    s, rank = scaling(config, module, where) if scale is None or config else (scale, down.shape[0])
    if rank != down.shape[0]:
        return f"the config says r = {rank} for {module}, the factors in {where} have {down.shape[0]}"
    if math.prod(up.shape[2:]) != 1:
        return f"lora_B {list(up.shape)} of {module} is not 1×1"
    term = Term((down.T,), up.T, s) if embedding else Term((as_matrix(up),), as_matrix(down), s)
    return _with_variants(config, module, slots, _Module(term, embedding))


def _with_variants(config: Mapping[str, Any], module: str, slots: Slots, plain: _Module) -> _Module | str:
    """MoSLoRA's mixer (ΔW = s·B·AB·A), and DoRA's magnitude and KaSA's diagonal, which the config must agree on."""
    mixer, width = slots.get("lora_AB"), plain.term.right.shape[0]
    if mixer is not None:
        if plain.embedding or mixer.shape != (width, width) or not mixer.is_float:
            return f"lora_AB {list(mixer.shape)} of {module} ({mixer.dtype}) does not fit its factors of rank {width}"
        plain = replace(plain, term=replace(plain.term, core=mixer))
    diagonal, magnitude = slots.get("lora_diag"), slots.get("lora_magnitude_vector")
    for option, key in (("kasa_config", "lora_diag"), ("use_dora", "lora_magnitude_vector")):
        claimed, there = bool(config.get(option)), key in slots
        if config and claimed != there and not (plain.embedding and option == "kasa_config"):
            found = "is there" if there else "is missing"
            return f"the config says {option} = {config.get(option)!r}, and {key} of {module} {found}"
    if diagonal is not None:
        if not diagonal.is_float or diagonal.shape != (width,):
            return f"lora_diag {list(diagonal.shape)} of {module} ({diagonal.dtype}) does not fit its factors"
        plain = replace(plain, term=replace(plain.term, inner_scale=diagonal))
    if magnitude is None:
        return plain
    why = dora.misfit(magnitude, plain.term.shape, "columns" if plain.embedding else "rows")
    return f"{module}: {why}" if why else replace(plain, magnitude=magnitude)


def _block_diagonal(
    config: Mapping[str, Any], module: str, down: TensorRef, up: TensorRef
) -> tuple[TensorRef, TensorRef] | str:
    """A and B with the one that is stored as stacked blocks put on its diagonal (BD-LoRA)."""
    options = config.get("use_bdlora")
    if not options:
        return down, up
    if not isinstance(options, Mapping) or not isinstance(options.get("nblocks"), int):
        return f"use_bdlora = {options!r} does not say how many blocks the factors of {module} have"
    count = options["nblocks"]
    sides = [any(str(part) in module for part in options.get(f"target_modules_bd_{side}") or ()) for side in ("a", "b")]
    if all(sides) or len(down.shape) != 2 or len(up.shape) != 2:
        return f"use_bdlora makes both factors of {module} block-diagonal, or one that is no matrix"
    blocked = (down if sides[0] else up) if any(sides) else None
    if blocked is not None and (count < 1 or blocked.shape[0] % count):
        return f"the {blocked.shape[0]} rows of {blocked.name} are not {count} blocks"
    return (down.block_diagonal(count) if sides[0] else down), (up.block_diagonal(count) if sides[1] else up)


def _add_modules(ledger: Ledger, config: Mapping[str, Any], found: Mapping[str, _Module], split: bool) -> None:
    for name, target in weight_targets(ledger, {name: item.term.shape for name, item in found.items()}).items():
        item = found[name]
        ref = target.ref if target.ref is not None and target.ref.is_float else None
        method = _method(config, item) if ref is not None else None
        note = "; ".join(filter(None, (item.note, _note(config, item, method), _tied(ledger, target))))
        if ref is None and item.magnitude is not None:
            ledger.refuse(target.name, item.term.shape, "unsupported", "DoRA needs the base weight as real numbers")
        elif method == "olora" and ledger.base and architectures.is_conv1d(ledger.base.config, target.name):
            ledger.refuse(target.name, item.term.shape, "unsupported", "OLoRA decomposes a Conv1D weight transposed")
        elif ref is None or (method is None and item.magnitude is None):
            add_factored(ledger, target, [item.term], split=split, note=note)
        else:
            add_update(ledger, target, _on_base(item, method, ref), split=split, note=note)


def _on_base(item: _Module, method: Method | None, ref: TensorRef) -> Update:
    """The update of a module that takes the base's weight to form."""
    update: Update = Factors((item.term,))
    if method is not None:
        update = FromOriginal(update, method, item.term.right.shape[0], item.term.scale, ref)
    if item.magnitude is not None:
        update = dora.Dora(ref, update, item.magnitude, "columns" if item.embedding else "rows")
    return update


def _method(config: Mapping[str, Any], item: _Module) -> Method | None:
    """How the initialisation changed the base's weight, where that can be done again exactly."""
    init = _init(config)
    if item.term.inner_scale is not None:
        return "kasa"
    if item.embedding:
        return None
    return "pissa" if init == "pissa" else "olora" if init == "olora" else None


def _init(config: Mapping[str, Any]) -> str:
    return str(config.get("init_lora_weights", "")).lower()


def _note(config: Mapping[str, Any], item: _Module, method: Method | None) -> str:
    """What the number is relative to, where the initialisation changed the base."""
    left = next((what for start, what in _CHANGED_BASE.items() if _init(config).startswith(start)), "")
    how = f"init_lora_weights={_init(config)!r}"
    if item.term.inner_scale is not None:
        left, how = "the truncated base", "KaSA"
    elif item.embedding or not left:
        return ""
    if method is not None:
        return f"relative to the base as given, taken for the original: what {how} took out of it is subtracted"
    return f"relative to {left} that {how} left, not to the original"


def _tied(ledger: Ledger, target: Target) -> str:
    """A note for an output layer whose weight the base holds in the embedding."""
    apart = ledger.base is None or target.ref is None or target.name in ledger.base.tensors
    return "" if apart else "tied in the base: merged, it changes the embedding as well"
