"""LoRA with several pairs (Aᵢ, Bᵢ) per module, of which a router, a task or nothing in the file says how they add up.

| names | format | ΔW |
|---|---|---|
| `lora_A0` …, `lora_B0` …, `lora_route` | LoRAMoE (Dou et al. 2024, eq. 5) | s·Σ ωᵢ(x)·Bᵢ·Aᵢ per token |
| `experts.0.lora_A` …, `moe_gate` | MixLoRA (Li et al. 2024, eq. 6) | s·Bᵢ·Aᵢ in expert i of the MLP |
| `lora_A.loraA.0` …, `lora_gate`, `lora_task_embedding` | MOELoRA (Liu et al. 2024, eq. 6) | s·Σ ωᵢ(t)·Bᵢ·Aᵢ per task |
| `lora_lambdas`, `lora_B_w` | MTL-LoRA (Yang et al. 2024, eq. 5) | s·(Σ_b softmax(w_t/τ)_b·B_b)·Λ_t·A per task |
| `lora_A` (n, r, in), `lora_B` (n, out, r) | particles, or modules that add up | s·Bᵢ·Aᵢ, or their sum |

What is certain is given, and named in every result; what is not is refused unless `heads=` asks for a member.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import Factors, Term, Update
from spectra.deltas.source import Source
from spectra.errors import SelectionError, SourceError, UnsupportedFormatError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Slots, Target, add_rest, add_update, modules_of, real, targets, unusable
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import scaling

if TYPE_CHECKING:
    from torch import Tensor

KIND = "mixture"
_SLOTS = (
    r"(?P<slot>lora_[AB]\d*|lora_route|lora_lambdas|lora_B_w|experts\.\d+\.lora_[AB]"
    r"|lora_[AB]\.(?:[^.]+\.)?lora[AB]\.\d+(?:\.mlp)?|lora_task_embedding(?:\.[^.]+)?|lora_gate\.(?:[^.]+\.)?GateL)"
    r"(?:\.weight)?"
)
_TELLING = re.compile(
    r"\.(?:lora_A\d+|lora_lambdas|lora_B_w|experts\.\d+\.lora_A|lora_A\.(?:[^.]+\.)?loraA\.\d+(?:\.mlp)?)(?:\.weight)?$"
)


@dataclass(frozen=True)
class Weighted:
    """ΔW = Σ ωᵢ · termᵢ with ω = softmax(logits).

    Attributes:
        terms: the members.
        logits: (n,), or (d,) to be multiplied by `gate`.
        gate: (n, d), or None.
        temperature: what the logits are divided by.
    """

    terms: tuple[Term, ...]
    logits: TensorRef
    gate: TensorRef | None = None
    temperature: float = 1.0

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The members', the logits and the gate."""
        found = tuple(ref for term in self.terms for ref in term.refs)
        return (*found, self.logits, *((self.gate,) if self.gate else ()))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.terms[0].shape

    @property
    def rank(self) -> int:
        """The sum of the members' widths, or one of them where all share the right factor."""
        widths = [term.lefts[0].shape[1] for term in self.terms]
        return min(widths[0] if self._shared else sum(widths), *self.shape)

    @property
    def _shared(self) -> bool:
        first = self.terms[0]
        return all((term.right, term.core) == (first.right, first.core) for term in self.terms)

    def read(self, device: str = "cpu") -> LowRank:
        """The factors in float64, the weights in the left one."""
        import torch

        weights = self._weights(device)
        pairs = [term.read(device) for term in self.terms]
        lefts = [weight * left for weight, (left, _) in zip(weights, pairs, strict=True)]
        if self._shared:
            return LowRank(torch.stack(lefts).sum(0), pairs[0][1])
        return LowRank(torch.cat(lefts, 1), torch.cat([right for _, right in pairs], 0))

    def _weights(self, device: str) -> Tensor:
        logits = self.logits.read_float64(device)
        if self.gate is not None:
            logits = self.gate.read_float64(device) @ logits
        return (logits / self.temperature).softmax(0)


@dataclass(frozen=True)
class _Members:
    """What one module offers.

    Attributes:
        each: the ΔW of every member.
        noun: what a member is.
        together: heads= → ΔW, for the definitions that make sense of all members; {} if none does.
        why: why there is no one ΔW otherwise.
    """

    each: tuple[Update, ...]
    noun: str
    together: Mapping[str, Update] = field(default_factory=dict)
    why: str = ""


def matches(folder: Folder) -> bool:
    """The names in the table above; of stacked factors those without a scaling beside them."""
    if any(_TELLING.search(name) for name in folder.tensors):
        return True
    scaled = any(name.endswith(("lora_scaling", "multilora_scaling")) for name in folder.tensors)
    return not scaled and any(name.endswith(".lora_A") and len(ref.shape) == 3 for name, ref in folder.tensors.items())


def open_mixture(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the pairs of every module. `heads`: an index for one member, "each" for all of them apart.

    Raises:
        SourceError: α/r is not known.
        SelectionError: there is no member of that index.
        UnsupportedFormatError: several A share one B (ALoRA).
    """
    config = tuned.adapter_config
    if config is None and scale is None:
        raise SourceError(f"{tuned.path} has no adapter_config.json beside it, so α/r is unknown: pass --scale")
    if config and config.get("use_dora"):
        raise UnsupportedFormatError(f"{tuned.path} holds several pairs per module under DoRA, which is not supported")
    ledger = Ledger(tuned, base)
    if config is not None and scale is not None:
        ledger.warnings.append("scale was ignored: adapter_config.json carries α and r")
    groups, rest = modules_of(ledger, _SLOTS)
    found: dict[str, _Members] = {}
    for module, slots in groups.items():
        name = re.sub(r"^mixlora\.", "model.", module)
        item = _members(config or {}, name, slots, _scale_of(config, name, scale, str(tuned.path)), str(tuned.path))
        if isinstance(item, str):
            ledger.refuse(f"{name}.weight", (), "unsupported", item)
        else:
            found[name] = item
    for name, target in targets(ledger, {name: item.each[0].shape for name, item in found.items()}).items():
        _add(ledger, target, found[name], split, heads)
    routers = [name for name in rest if name.endswith("moe_gate.weight")]
    ledger.skipped.update(dict.fromkeys(routers, "a router's weight, which chooses experts and changes none"))
    add_rest(ledger, [name for name in rest if name not in routers], split=split)
    return ledger.source(KIND)


def _scale_of(
    config: Mapping[str, Any] | None, module: str, given: float | None, where: str
) -> Callable[[int], float | str]:
    """s for factors of a rank, which must be the config's."""

    def check(rank: int) -> float | str:
        if config is None:
            return float(given or 0.0)
        s, configured = scaling(config, module, where)
        return s if configured == rank else f"the config says r = {configured} for {module}, the factors have {rank}"

    return check


def _members(
    config: Mapping[str, Any], module: str, slots: Slots, scale_of: Callable[[int], float | str], where: str
) -> _Members | str:
    """The members of one module by its tensors' names, or what is wrong with them."""
    why = unusable(slots, slots)
    if why:
        return f"{module}: {why}"
    names = set(slots)
    if any("loraA" in name or "loraB" in name for name in names):
        return _moelora(slots, scale_of)
    if names & {"lora_lambdas", "lora_B_w"}:
        return _mtl(config, slots, scale_of, where)
    if any(name.startswith("experts.") for name in names):
        return _mixlora(slots, scale_of)
    if any(re.fullmatch(r"lora_[AB]\d+", name) for name in names):
        if "lora_B" in names:
            raise UnsupportedFormatError(f"{where} holds an ALoRA (several A, one B), which is not supported")
        return _loramoe(slots, scale_of, config.get("lora_nums"))
    if names != {"lora_A", "lora_B"}:
        return f"{', '.join(sorted(names))} of {module} are no pair of factors"
    return _stacked(slots, scale_of) if len(slots["lora_A"].shape) == 3 else _plain(slots, scale_of)


def _numbered(slots: Slots, pattern: str) -> tuple[TensorRef, ...] | str:
    """Tensors 0, 1, …, whose slots fit the pattern with the index as its group."""
    found = {}
    for slot, ref in slots.items():
        match = re.fullmatch(pattern, slot)
        if match:
            found[int(match[1])] = ref
    if sorted(found) != list(range(len(found))) or not found:
        return f"members {sorted(found)} of {pattern.partition('(')[0]} are not 0, 1, …"
    return tuple(found[index] for index in sorted(found))


def _pairs(downs: tuple[TensorRef, ...] | str, ups: tuple[TensorRef, ...] | str) -> tuple[Term, ...] | str:
    """(Bᵢ, Aᵢ) of equal shapes for all i, without their scale; or what is wrong with them."""
    if isinstance(downs, str) or isinstance(ups, str):
        return downs if isinstance(downs, str) else str(ups)
    shapes = {(up.shape, down.shape) for up, down in zip(ups, downs, strict=False)}
    if len(downs) != len(ups) or len(shapes) != 1:
        return f"{len(downs)} A and {len(ups)} B of the shapes {sorted(shapes)} are no equal pairs"
    up, down = next(iter(shapes))
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or not down[0]:
        return f"B {list(up)} and A {list(down)} cannot be multiplied"
    return tuple(Term((b,), a) for b, a in zip(ups, downs, strict=True))


def _scaled(
    terms: tuple[Term, ...] | str, scale_of: Callable[[int], float | str], parts: int = 1
) -> tuple[Term, ...] | str:
    """The pairs with s in them, where the config's r counts `parts` of them."""
    if isinstance(terms, str):
        return terms
    s = scale_of(terms[0].right.shape[0] * parts)
    return s if isinstance(s, str) else tuple(replace(term, scale=s) for term in terms)


def _mean(terms: tuple[Term, ...]) -> Factors:
    return Factors(tuple(replace(term, scale=term.scale / len(terms)) for term in terms))


def _loramoe(slots: Slots, scale_of: Callable[[int], float | str], count: object) -> _Members | str:
    terms = _scaled(_pairs(_numbered(slots, r"lora_A(\d+)"), _numbered(slots, r"lora_B(\d+)")), scale_of)
    if isinstance(terms, str):
        return terms
    if count not in (None, len(terms)):
        return f"the config says {count} experts, the file has {len(terms)}"
    routed = "routed experts, no static ΔW exists" if "lora_route" in slots else "experts"
    return _Members(tuple(Factors((t,)) for t in terms), routed, {"mean": _mean(terms), "sum": Factors(terms)})


def _mixlora(slots: Slots, scale_of: Callable[[int], float | str]) -> _Members | str:
    if set(slots) & {"lora_A", "lora_B"}:
        return "factors for all tokens and factors per expert lie side by side"
    pairs = _pairs(_numbered(slots, r"experts\.(\d+)\.lora_A"), _numbered(slots, r"experts\.(\d+)\.lora_B"))
    terms = _scaled(pairs, scale_of)
    if isinstance(terms, str):
        return terms
    why = "each expert is an MLP of its own, and a router mixes what comes out of them (MixLoRA)"
    return _Members(tuple(Factors((t,)) for t in terms), "experts of the MLP", why=why)


def _moelora(slots: Slots, scale_of: Callable[[int], float | str]) -> _Members | str:
    """Every expert is stored under two names, of which the shorter is dropped."""
    short = {
        re.sub(r"^(lora_[AB])\.(?:[^.]+\.)?(lora[AB]\.\d+)(?:\.mlp)?$", r"\1.\2", n): ref for n, ref in slots.items()
    }
    short = {re.sub(r"^(lora_task_embedding|lora_gate)\..*$", r"\1", name): ref for name, ref in short.items()}
    pairs = _pairs(_numbered(short, r"lora_A\.loraA\.(\d+)"), _numbered(short, r"lora_B\.loraB\.(\d+)"))
    terms = _scaled(pairs, scale_of, parts=0 if isinstance(pairs, str) else len(pairs))
    if isinstance(terms, str):
        return terms
    embedding, gate = short.get("lora_task_embedding"), short.get("lora_gate")
    if embedding is None or gate is None:
        return (
            "the gate or the tasks' embedding of this MOELoRA is not in the file, so its experts' weights are unknown"
        )
    if len(embedding.shape) != 2 or not embedding.numel or gate.shape != (len(terms), embedding.shape[1]):
        return f"the gate {list(gate.shape)} does not fit {len(terms)} experts and tasks {list(embedding.shape)}"
    each = tuple(Weighted(terms, embedding.item(task), gate) for task in range(embedding.shape[0]))
    return _Members(each, "tasks", why="every task weighs the experts its own way (MOELoRA)")


def _mtl(config: Mapping[str, Any], slots: Slots, scale_of: Callable[[int], float | str], where: str) -> _Members | str:
    missing = sorted({"lora_A", "lora_B", "lora_lambdas", "lora_B_w"} - set(slots))
    if missing:
        return f"{missing[0]} of this MTL-LoRA is missing"
    down, ups, middle, logits = (slots[name] for name in ("lora_A", "lora_B", "lora_lambdas", "lora_B_w"))
    down = down.item(0) if len(down.shape) == 3 and down.shape[0] == 1 else down
    tasks, rank = (logits.shape or (0,))[0], (down.shape or (0,))[0]
    fits = len(down.shape) == 2 and len(ups.shape) == 3 and ups.shape[2] == rank and rank > 0 and tasks > 0
    if not fits or logits.shape != (tasks, ups.shape[0]) or middle.shape not in ((tasks, rank), (tasks, rank, rank)):
        return f"the tensors of this MTL-LoRA do not fit: { {name: list(ref.shape) for name, ref in slots.items()} }"
    s = scale_of(rank)
    if isinstance(s, str):
        return s
    if ups.shape[0] > 1 and "B_scale" not in config:
        return (
            "the temperature of this MTL-LoRA is not stored: put it into adapter_config.json as B_scale, with r and α"
        )
    temperature = real(config, "B_scale", where) if ups.shape[0] > 1 else 1.0
    if temperature <= 0:
        return f"B_scale = {temperature:g} is no temperature"
    each = []
    for task in range(tasks):
        inner = middle.item(task)
        key = "inner_scale" if len(inner.shape) == 1 else "core"
        terms = (Term((ups.item(b),), down, s, **{key: inner}) for b in range(ups.shape[0]))
        each.append(Weighted(tuple(terms), logits.item(task), None, temperature))
    return _Members(tuple(each), "tasks", why="every task has its own mixture of B and its own Λ (MTL-LoRA)")


def _stacked(slots: Slots, scale_of: Callable[[int], float | str]) -> _Members | str:
    downs, ups = slots["lora_A"], slots["lora_B"]
    if len(ups.shape) != 3 or not downs.shape[0] or downs.shape[0] != ups.shape[0]:
        return f"lora_A {list(downs.shape)} and lora_B {list(ups.shape)} are no stacks of pairs"
    items = [tuple(ref.item(i) for i in range(ref.shape[0])) for ref in (downs, ups)]
    terms = _scaled(_pairs(items[0], items[1]), scale_of)
    if isinstance(terms, str):
        return terms
    why = "stacked factors without a scaling may be particles, of which one is drawn, or modules that add up"
    return _Members(tuple(Factors((t,)) for t in terms), "stacked pairs", {"sum": Factors(terms)}, why)


def _plain(slots: Slots, scale_of: Callable[[int], float | str]) -> _Members | str:
    """A module with one pair beside others with several."""
    terms = _scaled(_pairs((slots["lora_A"],), (slots["lora_B"],)), scale_of)
    return terms if isinstance(terms, str) else _Members((Factors(terms),), "")


def _add(ledger: Ledger, target: Target, found: _Members, split: bool, heads: str | int) -> None:
    count = len(found.each)
    if not found.noun:
        add_update(ledger, target, found.each[0], split=split)
        return
    if heads in ("mean", "sum"):
        update = found.together.get(str(heads))
        if update is not None:
            add_update(ledger, target, update, split=split, note=f"{heads} of {count} {found.noun}")
            return
        why = f"{found.why}: pass heads= an index from 0 to {count - 1}, or each"
        known = " or ".join(found.together)
        ledger.refuse(target.name, found.each[0].shape, "unsupported", why + (f", or {known}" if known else ""))
        return
    if heads != "each" and (not isinstance(heads, int) or not 0 <= heads < count):
        raise SelectionError(
            f"{target.name} has {count} {found.noun}, 0 to {count - 1}; heads={heads!r} is none of them"
        )
    for index in range(count) if heads == "each" else [int(heads)]:
        part = Target(f"{target.name}[head{index}]", target.ref)
        add_update(ledger, part, found.each[index], split=False, note=f"number {index} of {count} {found.noun}")
