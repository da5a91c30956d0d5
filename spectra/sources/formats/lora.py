"""LoRA as PEFT saves it: ΔW = s·B·A per module, and what PEFT builds on the same factors.

Linear layers, convolutions, embeddings and `nn.MultiheadAttention`; DoRA, KaSA, MoSLoRA, LoRA-XS, block-diagonal
factors; stacked experts (experts.py); initialisations that changed the base (residual.py).
References: Hu et al. 2021, §4.1 (LoRA); the variants' own files name theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from spectra.deltas.recipes import Factors, Term, Update
from spectra.errors import UnsupportedFormatError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import architectures
from spectra.models.matrices import as_matrix
from spectra.models.pairing import unwrap
from spectra.sources.adapter import Refusal, Slots, add_factored, add_update, slot_pattern
from spectra.sources.config import Config
from spectra.sources.formats import dora, lora_experts
from spectra.sources.formats.residual import FromOriginal, Method
from spectra.sources.formats.trainable_tokens import add_tokens
from spectra.sources.ledger import Ledger
from spectra.sources.targets import weight_targets

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
# LoRA-XS, LoRA-SB and Fed-SB: R (r, r) beside a module, after the module's name or after a dot and the adapter's.
_LATENT = "_lora_latent_mapping"
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
    named = any(mark in folder.listing for mark in (".lora_A", ".lora_embedding_A"))
    return named and declared == "LORA"


def read(ledger: Ledger) -> None:
    """Enter every module's factors, the experts of stacked parameters, and trained tokens.

    Raises:
        UnsupportedFormatError: the config says that there is no one ΔW, or one of weights that are not known.
        BaseRequiredError: a module is a DoRA and there is no base.
    """
    for option, what in _NOT_PLAIN.items():
        if ledger.config.get(option):
            raise UnsupportedFormatError(f"{ledger.where} holds {what}; there is no one ΔW to analyse")
    if ledger.config.get("layer_replication") and ledger.base is not None:
        ledger.base = None
        ledger.warnings.append("layer_replication: names are those of the enlarged model, and the base was not used")
    groups = _with_latent(ledger, ledger.modules(_SLOTS))
    stacks = {m: slots for m, slots in groups.items() if lora_experts.parameters_of(ledger.config, m)}
    modules: dict[str, _Module] = {}
    for module in groups:
        if module not in stacks:
            name, owner, twice = _place(module, groups)
            with ledger.attempt(name):
                item = _module(ledger, owner, groups[module])
                modules[name] = _twice(item) if twice else item
    if any(item.magnitude is not None for item in modules.values()):
        if ledger.config.get("layer_replication"):
            raise UnsupportedFormatError(
                f"{ledger.where}: ΔW of DoRA depends on the base weights, and after layer_replication the layers have "
                "other numbers than the base's, which is not read: compare what PEFT makes of the adapter instead"
            )
        ledger.need_base()
    _add_modules(ledger, modules)
    lora_experts.add_stacks(ledger, stacks)
    add_tokens(ledger)
    for name in ledger.tuned.tensors:
        if any(word in name for word in _TRAINING_ONLY):
            ledger.skip(name, "used while training only")


def _with_latent(ledger: Ledger, groups: dict[str, Slots]) -> dict[str, Slots]:
    """The modules with the R that LoRA-XS trains between frozen factors, which every module has or none."""
    latent = False
    for name in (*ledger.tuned.tensors, *ledger.tuned.broken):
        path, mark, rest = unwrap(name).partition(_LATENT)
        module = path if path in groups else path.rpartition(".")[0]
        if not mark or rest not in ("", ".weight") or module not in groups:
            continue
        latent = True
        ledger.owners[name] = module
        if name in ledger.tuned.broken:
            ledger.refuse(f"{module}.weight", (), "unreadable", ledger.tuned.broken[name])
            del groups[module]
        else:
            groups[module]["lora_latent_mapping"] = ledger.tuned.tensors[name]
    for module in [m for m, slots in groups.items() if latent and "lora_latent_mapping" not in slots]:
        why = f"the other modules are LoRA-XS, and lora_latent_mapping of {module} is missing in {ledger.where}"
        ledger.refuse(f"{module}.weight", (), "unsupported", why)
        del groups[module]
    return groups


def _place(module: str, modules: Mapping[str, Slots]) -> tuple[str, str, bool]:
    """The name of a module's weight in the model, the module whose options count, and whether the update counts twice.

    PEFT wraps `nn.MultiheadAttention` as a whole: the factors of the input weight, which has a name of its
    own, are those of the wrapper. The output projection's lie inside it, and PEFT (0.21 and before) adds
    them twice, in every forward pass as in the merge: so did the training.
    """
    owner, inside = lora_experts.owner_of(module), ".base_layer.out_proj"
    if f"{module}{inside}" in modules:
        return f"{owner}.in_proj_weight", owner, False
    around = module.removesuffix(inside)
    if around == module or around not in modules:
        return f"{owner}.weight", owner, False
    return f"{owner}.weight", lora_experts.owner_of(around), True


def _twice(item: _Module) -> _Module:
    note = "twice s·B·A, as PEFT applies it to the output projection of nn.MultiheadAttention"
    return replace(item, term=replace(item.term, scale=2 * item.term.scale), note=note)


def _module(ledger: Ledger, module: str, slots: Slots) -> _Module:
    """The factors of one module in Linear orientation."""
    embedding = "lora_embedding_A" in slots or "lora_embedding_B" in slots
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [name for name in names if name not in slots]
    if missing:
        raise Refusal(f"{missing[0]} of {module} is missing in {ledger.where}")
    down, up = _block_diagonal(ledger, module, *slots.real(*names))
    if len(down.shape) < 2 or len(up.shape) < 2 or up.shape[1] != down.shape[0]:
        raise Refusal(f"lora_A {list(down.shape)} and lora_B {list(up.shape)} of {module} cannot be multiplied")
    s = ledger.scale_of(module, down.shape[0])
    if math.prod(up.shape[2:]) != 1:
        raise Refusal(f"lora_B {list(up.shape)} of {module} is not 1×1")
    term = Term((down.T,), up.T, s) if embedding else Term((as_matrix(up),), as_matrix(down), s)
    return _with_variants(ledger.config, module, slots, _Module(term, embedding))


def _with_variants(config: Config, module: str, slots: Slots, plain: _Module) -> _Module:
    """What lies between the factors, and DoRA's magnitude and KaSA's diagonal, which the config must agree on.

    A mixer (MoSLoRA's AB, LoRA-XS' R) gives ΔW = s·B·R·A.
    """
    width = plain.term.right.shape[0]
    for name in sorted({"lora_AB", "lora_latent_mapping"} & set(slots)):
        mixer = slots[name]
        if plain.embedding or plain.term.core or mixer.shape != (width, width) or not mixer.is_float:
            what = f"{name} {list(mixer.shape)} of {module} ({mixer.dtype})"
            raise Refusal(f"{what} does not fit its factors of rank {width}")
        plain = replace(plain, term=replace(plain.term, core=mixer))
    diagonal, magnitude = slots.get("lora_diag"), slots.get("lora_magnitude_vector")
    for option, key in (("kasa_config", "lora_diag"), ("use_dora", "lora_magnitude_vector")):
        claimed, there = bool(config.get(option)), key in slots
        if config and claimed != there and not (plain.embedding and option == "kasa_config"):
            presence = "is there" if there else "is missing"
            raise Refusal(f"the config says {option} = {config.get(option)!r}, and {key} of {module} {presence}")
    if diagonal is not None:
        if not diagonal.is_float or diagonal.shape != (width,):
            raise Refusal(f"lora_diag {list(diagonal.shape)} of {module} ({diagonal.dtype}) does not fit its factors")
        plain = replace(plain, term=replace(plain.term, inner_scale=diagonal))
    if magnitude is None:
        return plain
    why = dora.misfit(magnitude, plain.term.shape, "columns" if plain.embedding else "rows")
    if why:
        raise Refusal(f"{module}: {why}")
    return replace(plain, magnitude=magnitude)


def _block_diagonal(ledger: Ledger, module: str, down: TensorRef, up: TensorRef) -> tuple[TensorRef, TensorRef]:
    """A and B with the one that is stored as stacked blocks put on its diagonal (BD-LoRA)."""
    options = ledger.config.get("use_bdlora")
    if not options:
        return down, up
    if not isinstance(options, Mapping) or not isinstance(options.get("nblocks"), int):
        raise Refusal(f"use_bdlora = {options!r} does not say how many blocks the factors of {module} have")
    count = options["nblocks"]
    sides = [any(str(part) in module for part in options.get(f"target_modules_bd_{side}") or ()) for side in ("a", "b")]
    if all(sides) or len(down.shape) != 2 or len(up.shape) != 2:
        raise Refusal(f"use_bdlora makes both factors of {module} block-diagonal, or one that is no matrix")
    blocked = (down if sides[0] else up) if any(sides) else None
    if blocked is not None and (count < 1 or blocked.shape[0] % count):
        raise Refusal(f"the {blocked.shape[0]} rows of {blocked.name} are not {count} blocks")
    return (down.block_diagonal(count) if sides[0] else down), (up.block_diagonal(count) if sides[1] else up)


def _add_modules(ledger: Ledger, modules: Mapping[str, _Module]) -> None:
    for name, target in weight_targets(ledger, {name: item.term.shape for name, item in modules.items()}).items():
        item = modules[name]
        with ledger.attempt(target.name, item.term.shape):
            ref = target.real
            method = _method(ledger.config, item) if ref is not None else None
            note = "; ".join(filter(None, (item.note, _note(ledger.config, item, method))))
            if ref is None and item.magnitude is not None:
                raise Refusal("DoRA needs the base weight as real numbers")
            if method == "olora" and ledger.base and architectures.is_conv1d(ledger.base.config, target.name):
                raise Refusal("OLoRA decomposes a Conv1D weight transposed")
            if ref is None or (method is None and item.magnitude is None):
                add_factored(ledger, target, [item.term], note=note)
            else:
                add_update(ledger, target, _on_base(item, method, ref), note=note)


def _on_base(item: _Module, method: Method | None, ref: TensorRef) -> Update:
    """The update of a module that takes the base's weight to form."""
    update: Update = Factors((item.term,))
    if method is not None:
        update = FromOriginal(ref, update, method, item.term.right.shape[0], item.term.scale)
    if item.magnitude is not None:
        update = dora.Dora(ref, update, item.magnitude, "columns" if item.embedding else "rows")
    return update


def _method(config: Config, item: _Module) -> Method | None:
    """How the initialisation changed the base's weight, where that can be done again exactly."""
    init = _init(config)
    if item.term.inner_scale is not None:
        return "kasa"
    if item.embedding:
        return None
    return "pissa" if init == "pissa" else "olora" if init == "olora" else None


def _init(config: Config) -> str:
    return str(config.get("init_lora_weights", "")).lower()


def _note(config: Config, item: _Module, method: Method | None) -> str:
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
