"""Multi-head LoRA (R-LoRA, HydraLoRA): one shared A, heads B₀ … B_{N−1}, and often a router.

A routed ΔW(x) = s·Σ_k ω_k(x)·B_k·A depends on the input, so there is no one ΔW. What is analysed is
named in every result: the mean of the heads, their sum, one head, or each.
Reference: Liu et al. 2025 (R-LoRA), §3; Tian et al. 2024 (HydraLoRA), §3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from spectra.deltas.recipes import Term
from spectra.deltas.source import Source
from spectra.errors import SelectionError, SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Slots, Target, add_factored, add_rest, modules_of, targets
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import scaling

KIND = "multihead"
_SLOTS = (
    r"(?P<slot>lora_A|lora_B\d*|lora_route|lora_router|rlora_A|rlora_B|rlora_route|rlora_router"
    r"|rlora_offset_A|rlora_offset_B)(?:\.weight)?"
)
_HEAD = re.compile(r"\.lora_B\d+(\.weight)?$")


@dataclass(frozen=True)
class _Heads:
    """The shared A (r, in), the heads (out, r), whether a router weighs them, and the offset's factors."""

    down: TensorRef
    ups: tuple[TensorRef, ...]
    routed: bool
    offset: tuple[TensorRef, TensorRef] | None = None


def matches(folder: Folder) -> bool:
    """Numbered heads lora_B0 …, stacked heads rlora_B, or packed heads that the config counts."""
    if any(re.search(r"\.lora_A\d+(\.weight)?$", name) for name in folder.tensors):
        return False  # several A: LoRAMoE and kin
    numbered = any(_HEAD.search(name) or ".rlora_B" in name for name in folder.tensors)
    return numbered or (folder.adapter_config or {}).get("lora_nums") is not None


def open_multihead(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the heads of every module.

    Raises:
        SourceError: α/r is not known.
        SelectionError: there is no head of that index.
    """
    config = tuned.adapter_config
    if config is None and scale is None:
        raise SourceError(f"{tuned.path} has no adapter_config.json beside it, so α/r is unknown: pass --scale")
    ledger = Ledger(tuned, base)
    groups, rest = modules_of(ledger, _SLOTS)
    count = (config or {}).get("lora_nums", (config or {}).get("num_heads"))
    modules: dict[str, _Heads] = {}
    scales: dict[str, float] = {}
    for module, slots in groups.items():
        found = _heads(slots, count)
        s, rank = (scale, None) if scale is not None else scaling(config or {}, module, str(tuned.path))
        if not isinstance(found, str) and rank not in (None, found.down.shape[0]):
            found = f"the config says r = {rank} for {module}, the factors have {found.down.shape[0]}"
        if isinstance(found, str):
            ledger.refuse(f"{module}.weight", (), "unsupported", f"{found} in {tuned.path}")
        else:
            modules[module], scales[module] = found, s
    shapes = {module: (item.ups[0].shape[0], item.down.shape[1]) for module, item in modules.items()}
    for module, target in targets(ledger, shapes).items():
        _add(ledger, target, modules[module], scales[module], split, heads)
    if scale is not None:
        ledger.warnings.append(f"s = {scale:g} as given, whatever the config says")
    if modules and all(item.offset is None for item in modules.values()):
        ledger.warnings.append(
            "no offset is saved: if the heads started from random values (R-LoRA), "
            "ΔW is relative to the compensated base"
        )
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _add(ledger: Ledger, target: Target, found: _Heads, s: float, split: bool, heads: str | int) -> None:
    count = len(found.ups)
    routed = f"{count} routed heads, no static ΔW exists" if found.routed else f"{count} heads"
    offset = [Term((found.offset[0],), found.offset[1], -s)] if found.offset else []
    if heads in ("mean", "sum"):
        term = Term(found.ups, found.down, s / count if heads == "mean" else s)
        add_factored(ledger, target, [term, *offset], split=split, note=f"{heads} of {routed}")
        return
    if heads != "each" and (not isinstance(heads, int) or not 0 <= heads < count):
        raise SelectionError(f"{target.name} has heads 0 to {count - 1}; heads={heads!r} is none of them")
    for index in range(count) if heads == "each" else [int(heads)]:
        part = Target(f"{target.name}[head{index}]", target.ref)
        terms = [Term((found.ups[index],), found.down, s), *offset]
        add_factored(ledger, part, terms, split=False, note=f"head {index} of {routed}")


def _heads(slots: Slots, count: object) -> _Heads | str:
    """The tensors of one module with matching shapes, or what is wrong with them."""
    down = slots.get("lora_A") or slots.get("rlora_A")
    if down is None or len(down.shape) != 2:
        return "the shared A (r, in) is missing"
    ups = _ups(slots, down.shape[0], count)
    if isinstance(ups, str):
        return ups
    if not ups or any(len(up.shape) != 2 or up.shape != (ups[0].shape[0], down.shape[0]) for up in ups):
        return f"the heads {[list(up.shape) for up in ups]} do not fit A {list(down.shape)}"
    if not all(ref.is_float for ref in (down, *ups)):
        return "the factors are not stored as real numbers"
    routed = any("route" in slot for slot in slots)
    if ("rlora_offset_A" in slots) != ("rlora_offset_B" in slots):
        return "one factor of the offset is missing"
    if "rlora_offset_A" not in slots:
        return _Heads(down, ups, routed)
    up0, down0 = slots["rlora_offset_B"], slots["rlora_offset_A"]
    if not (up0.is_float and down0.is_float) or (up0.shape, down0.shape) != (ups[0].shape, down.shape):
        return f"the offset's B {list(up0.shape)} and A {list(down0.shape)} do not fit the heads"
    return _Heads(down, ups, routed, (up0, down0))


def _ups(slots: Slots, rank: int, count: object) -> tuple[TensorRef, ...] | str:
    numbered = {int(slot[6:]): ref for slot, ref in slots.items() if re.fullmatch(r"lora_B\d+", slot)}
    if numbered:
        if sorted(numbered) != list(range(len(numbered))) or count not in (None, len(numbered)):
            return f"the heads {sorted(numbered)} are not 0 to {count or len(numbered)} − 1"
        return tuple(numbered[index] for index in sorted(numbered))
    stacked = slots.get("rlora_B")
    if stacked is not None:
        if len(stacked.shape) != 3 or count not in (None, stacked.shape[0]):
            return f"the heads {list(stacked.shape)} are not (N, out, r) with N = {count}"
        return tuple(stacked.item(index) for index in range(stacked.shape[0]))
    packed = slots.get("lora_B")
    if packed is None or not isinstance(count, int) or packed.shape[1:] != (count * rank,):
        return f"the packed heads {list(packed.shape) if packed else 'lora_B'} are not (out, {count}·{rank})"
    return tuple(packed.T.rows(k * rank, (k + 1) * rank).T for k in range(count))
