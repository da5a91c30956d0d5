"""Multi-head LoRA (R-LoRA, HydraLoRA): one shared A, heads B₀ … B_{N−1}, and often a router.

A routed ΔW(x) = s·Σ_k ω_k(x)·B_k·A depends on the input, so there is no one ΔW. What is analysed is
named in every result: the mean of the heads, their sum, one head, or each.
Reference: Liu et al. 2025 (R-LoRA); Tian et al. 2024 (HydraLoRA).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from spectra.deltas.recipes import Term
from spectra.errors import SelectionError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, Target, add_factored
from spectra.sources.ledger import Ledger
from spectra.sources.targets import targets

_SLOTS = (
    r"(?P<slot>lora_A|lora_B\d*|lora_route|lora_router|rlora_A|rlora_B|rlora_route|rlora_router"
    r"|rlora_offset_A|rlora_offset_B)(?:\.weight)?"
)
_HEAD = re.compile(r"\.lora_B\d+(\.weight)?$")


@dataclass(frozen=True)
class _Heads:
    """The shared A (r, in), the heads (out, r), s, whether a router weighs them, and the offset's factors."""

    down: TensorRef
    ups: tuple[TensorRef, ...]
    s: float
    routed: bool
    offset: tuple[TensorRef, TensorRef] | None = None


def matches(folder: Folder) -> bool:
    """Numbered heads lora_B0 …, stacked heads rlora_B, or packed heads that the config counts."""
    if any(re.search(r"\.lora_A\d+(\.weight)?$", name) for name in folder.tensors):
        return False  # several A: LoRAMoE and kin
    numbered = any(_HEAD.search(name) or ".rlora_B" in name for name in folder.tensors)
    return numbered or (folder.adapter_config or {}).get("lora_nums") is not None


def read(ledger: Ledger) -> None:
    """Enter the heads of every module, as the mean, the sum, one of them, or each apart.

    Raises:
        SourceError: α/r is not known.
        SelectionError: there is no head of that index.
    """
    ledger.need_scale()
    modules: dict[str, _Heads] = {}
    for module, slots in ledger.modules(_SLOTS).items():
        with ledger.attempt(f"{module}.weight"):
            modules[module] = _heads(ledger, module, slots)
    shapes = {module: (item.ups[0].shape[0], item.down.shape[1]) for module, item in modules.items()}
    for module, target in targets(ledger, shapes).items():
        _add(ledger, target, modules[module])
    if ledger.scale is not None:
        ledger.warnings.append(f"s = {ledger.scale:g} as given, whatever the config says")
    if modules and all(item.offset is None for item in modules.values()):
        ledger.warnings.append(
            "no offset is saved: if the heads started from random values (R-LoRA), "
            "ΔW is relative to the compensated base"
        )


def _add(ledger: Ledger, target: Target, found: _Heads) -> None:
    heads, count = ledger.heads, len(found.ups)
    routed = f"{count} routed heads, no static ΔW exists" if found.routed else f"{count} heads"
    offset = [Term((found.offset[0],), found.offset[1], -found.s)] if found.offset else []
    if heads in ("mean", "sum"):
        term = Term(found.ups, found.down, found.s / count if heads == "mean" else found.s)
        add_factored(ledger, target, [term, *offset], note=f"{heads} of {routed}")
        return
    if heads != "each" and (not isinstance(heads, int) or not 0 <= heads < count):
        raise SelectionError(f"{target.name} has heads 0 to {count - 1}; heads={heads!r} is none of them")
    for index in range(count) if heads == "each" else [int(heads)]:
        part = replace(target, name=f"{target.name}[head{index}]")
        terms = [Term((found.ups[index],), found.down, found.s), *offset]
        add_factored(ledger, part, terms, note=f"head {index} of {routed}", whole=True)
    ledger.use(found.ups)


def _heads(ledger: Ledger, module: str, slots: Slots) -> _Heads:
    """The tensors of one module, whose shapes must match each other and the config."""
    seed = ledger.config.get("init_seed")
    if seed is not None and ledger.config.get("init_weights", True):
        raise Refusal(
            "this R-LoRA of a PEFT fork takes a random product off the base that is in no file: it is drawn again from "
            f"init_seed = {seed} at each load. Merge it with the library that saved it, and give the merged model as "
            "tuned"
        )
    down = slots.get("lora_A") or slots.get("rlora_A")
    if down is None or len(down.shape) != 2:
        raise Refusal(f"the shared A (r, in) is missing in {ledger.where}")
    ups = _ups(ledger, slots, down.shape[0])
    if not ups or any(len(up.shape) != 2 or up.shape != (ups[0].shape[0], down.shape[0]) for up in ups):
        shapes = [list(up.shape) for up in ups]
        raise Refusal(f"the heads {shapes} do not fit A {list(down.shape)} in {ledger.where}")
    if not all(ref.is_float for ref in (down, *ups)):
        raise Refusal(f"the factors are not stored as real numbers in {ledger.where}")
    s = ledger.scale if ledger.scale is not None else _scale(ledger, module, down.shape[0])
    routers = {slot: ref for slot, ref in slots.items() if "route" in slot}
    ledger.use(routers.values())  # zero router logits are what the mean stands for
    return _Heads(down, ups, s, bool(routers), _offset(ledger, slots, down, ups))


def _scale(ledger: Ledger, module: str, rank: int) -> float:
    fork = ledger.config.get("rlora_alpha") is not None  # as a PEFT fork calls α
    return ledger.scale_of(module, rank, alpha_key="rlora_alpha" if fork else "lora_alpha")


def _offset(
    ledger: Ledger, slots: Slots, down: TensorRef, ups: tuple[TensorRef, ...]
) -> tuple[TensorRef, TensorRef] | None:
    """B̄⁰ and A⁰, by which the base was compensated at the start, where they are saved."""
    if ("rlora_offset_A" in slots) != ("rlora_offset_B" in slots):
        raise Refusal(f"one factor of the offset is missing in {ledger.where}")
    if "rlora_offset_A" not in slots:
        return None
    up0, down0 = slots["rlora_offset_B"], slots["rlora_offset_A"]
    if not (up0.is_float and down0.is_float) or (up0.shape, down0.shape) != (ups[0].shape, down.shape):
        shapes = f"B {list(up0.shape)} and A {list(down0.shape)}"
        raise Refusal(f"the offset's {shapes} do not fit the heads in {ledger.where}")
    return up0, down0


def _ups(ledger: Ledger, slots: Slots, rank: int) -> tuple[TensorRef, ...]:
    """The heads (out, r): numbered, stacked, or packed side by side."""
    count = ledger.config.get("lora_nums", ledger.config.get("num_heads"))
    numbered = {int(slot[6:]): ref for slot, ref in slots.items() if re.fullmatch(r"lora_B\d+", slot)}
    if numbered:
        if sorted(numbered) != list(range(len(numbered))) or count not in (None, len(numbered)):
            there = f"the heads {sorted(numbered)} are not 0 to {count or len(numbered)} − 1"
            raise Refusal(f"{there} in {ledger.where}")
        return tuple(numbered[index] for index in sorted(numbered))
    stacked = slots.get("rlora_B")
    if stacked is not None:
        if len(stacked.shape) != 3 or count not in (None, stacked.shape[0]):
            raise Refusal(f"the heads {list(stacked.shape)} are not (N, out, r) with N = {count} in {ledger.where}")
        return tuple(stacked.item(index) for index in range(stacked.shape[0]))
    packed = slots.get("lora_B")
    if packed is None or not isinstance(count, int) or packed.shape[1:] != (count * rank,):
        there = f"the packed heads {list(packed.shape) if packed else 'lora_B'} are not (out, {count}·{rank})"
        raise Refusal(f"{there} in {ledger.where}")
    return tuple(packed.T.rows(k * rank, (k + 1) * rank).T for k in range(count))
