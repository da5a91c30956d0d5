"""LoRA as PEFT saves it: ΔW = s·B·A per module, for linear layers, convolutions and embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spectra.errors import SourceError
from spectra.sources.adapter import (
    add_factored,
    add_saved_weights,
    by_module,
    refuse_heads,
    targets,
)
from spectra.sources.folder import Folder
from spectra.sources.ledger import Ledger
from spectra.sources.recipes import Term
from spectra.sources.scaling import scaling
from spectra.sources.tensors import TensorRef
from spectra.types import Source

KIND = "lora"
_SLOTS = (
    r"(?P<slot>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva_residual")


def matches(folder: Folder) -> bool:
    """Factors named lora_A / lora_B, and a config that does not claim to be something else."""
    declared = str((folder.adapter_config or {}).get("peft_type", "LORA"))
    named = any(".lora_A" in name or ".lora_embedding_A" in name for name in folder.tensors)
    return named and declared == "LORA"


def open_lora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read every module's factors and scale.

    Raises:
        SourceError: the config is missing or unusable, or no module is complete.
    """
    if tuned.adapter_config is None and scale is None:
        raise SourceError(
            f"{tuned.path} has LoRA factors but no adapter_config.json beside it, so α/r is unknown: "
            "put the config back or pass --scale"
        )
    config = tuned.adapter_config or {}
    ledger = Ledger(tuned, base)
    refuse_heads(ledger, heads)
    if scale is not None and tuned.adapter_config is not None:
        ledger.warnings.append("scale was ignored: adapter_config.json carries α and r")
    groups, rest = by_module(tuned.tensors, _SLOTS)
    broken, _ = by_module(tuned.broken, _SLOTS)
    updates: dict[str, Term] = {}
    for module, slots in groups.items():
        lost = [tuned.broken[name] for name in broken.pop(module, {}).values()]
        term, why = _term(
            config,
            module,
            {s: tuned.tensors[name] for s, name in slots.items()},
            scale,
            str(tuned.path),
        )
        if lost or term is None:
            ledger.refuse(f"{module}.weight", (), "unreadable" if lost else "unsupported", (lost or [why])[0])
        else:
            updates[module] = term
    for module, slots in broken.items():
        ledger.refuse(f"{module}.weight", (), "unreadable", tuned.broken[next(iter(slots.values()))])
    found = targets(ledger, {module: (t.lefts[0].shape[0], t.right.shape[1]) for module, t in updates.items()})
    note = _relative_to(config)
    for module, target in found.items():
        add_factored(ledger, target, [updates[module]], split=split, note=note)
    biases = [name for name in rest if name.endswith(".bias")]
    ledger.skipped.update(dict.fromkeys(biases, "a bias, not a matrix"))
    add_saved_weights(ledger, [name for name in rest if name not in biases], split=split)
    return ledger.source(KIND)


def _term(
    config: Mapping[str, Any],
    module: str,
    slots: dict[str, TensorRef],
    scale: float | None,
    where: str,
) -> tuple[Term | None, str]:
    """The factors of one module in Linear orientation, or why there are none."""
    if "lora_magnitude_vector" in slots:
        return None, "DoRA rescales the rows of the whole weight and is not supported yet"
    embedding = "lora_embedding_A" in slots or "lora_embedding_B" in slots
    down, up = (slots.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    if down is None or up is None:
        return None, f"lora_{'A' if down is None else 'B'} of {module} is missing in {where}"
    if len(down.shape) < 2 or len(up.shape) < 2 or up.shape[1] != down.shape[0]:
        return (
            None,
            f"lora_A {list(down.shape)} and lora_B {list(up.shape)} of {module} cannot be multiplied",
        )
    if not down.is_float or not up.is_float:
        return (
            None,
            f"the factors of {module} are stored as {down.dtype} and {up.dtype}, not as real numbers",
        )
    s, rank = scaling(config, module, where) if scale is None or config else (scale, down.shape[0])
    if rank != down.shape[0]:
        return (
            None,
            f"the config says r = {rank} for {module}, the factors in {where} have {down.shape[0]}",
        )
    if embedding:
        return Term((down.T,), up.T, s), ""
    if math.prod(up.shape[2:]) != 1:
        return None, f"lora_B {list(up.shape)} of {module} is not 1×1"
    return Term((_flat(up),), _flat(down), s), ""


def _flat(ref: TensorRef) -> TensorRef:
    return ref if len(ref.shape) == 2 else ref.reshape(ref.shape[0], math.prod(ref.shape[1:]))


def _relative_to(config: Mapping[str, Any]) -> str:
    """Initialisations that changed the base: B·A is then relative to what they left of it."""
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGED_BASE):
        return f"relative to the residual base that init_lora_weights={init!r} left, not to the original"
    return ""
