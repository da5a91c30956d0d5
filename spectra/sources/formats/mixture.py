"""LoRA with several pairs (Aᵢ, Bᵢ) per module, of which a router, a task or nothing in the file says how they add up.

| names | format | ΔW |
|---|---|---|
| `lora_A0` …, `lora_B0` …, `lora_route` | LoRAMoE (Dou et al. 2024) | s·Σ ωᵢ(x)·Bᵢ·Aᵢ per token |
| `experts.0.lora_A` …, `moe_gate` | MixLoRA (Li et al. 2024) | s·Bᵢ·Aᵢ in expert i of the MLP |
| `lora_A.loraA.0` …, `lora_gate`, `lora_task_embedding` | MOELoRA (Liu et al. 2024) | s·Σ ωᵢ(t)·Bᵢ·Aᵢ per task |
| `lora_lambdas`, `lora_B_w` | MTL-LoRA (Yang et al. 2024) | s·(Σ_b softmax(w_t/τ)_b·B_b)·Λ_t·A per task |
| `lora_A` (n, r, in), `lora_B` (n, out, r) | particles, or modules that add up | s·Bᵢ·Aᵢ, or their sum |

What is certain is given, and named in every result; what is not is refused unless `heads=` asks for a member.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import Factors, FromTensors, Term, Update
from spectra.errors import SelectionError, UnsupportedFormatError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, Target, add_update
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger
from spectra.sources.targets import targets

if TYPE_CHECKING:
    from torch import Tensor

_SLOTS = (
    r"(?P<slot>lora_[AB]\d*|lora_route|lora_lambdas|lora_B_w|experts\.\d+\.lora_[AB]"
    r"|lora_[AB]\.(?:[^.]+\.)?lora[AB]\.\d+(?:\.mlp)?|lora_task_embedding(?:\.[^.]+)?|lora_gate\.(?:[^.]+\.)?GateL)"
    r"(?:\.weight)?"
)
_TELLING = re.compile(
    r"\.(?:lora_A\d+|lora_lambdas|lora_B_w|experts\.\d+\.lora_A|lora_A\.(?:[^.]+\.)?loraA\.\d+(?:\.mlp)?)(?:\.weight)?$"
)


@dataclass(frozen=True)
class Weighted(FromTensors):
    """ΔW = Σ ωᵢ · termᵢ with ω = softmax(logits).

    Attributes:
        terms: the members.
        logits: (n,), or (d,) to be multiplied by `gate`.
        gate: (n, d), or None.
        temperature: what the logits are divided by.
    """

    factored = True
    terms: tuple[Term, ...]
    logits: TensorRef
    gate: TensorRef | None = None
    temperature: float = 1.0

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


def read(ledger: Ledger) -> None:
    """Enter the pairs of every module. `heads`: an index for one member, "each" for all of them apart.

    Raises:
        SelectionError: there is no member of that index.
        UnsupportedFormatError: several A share one B (ALoRA).
    """
    if ledger.config.get("use_dora"):
        raise UnsupportedFormatError(
            f"{ledger.where} holds several pairs per module under DoRA, which is not supported"
        )
    members: dict[str, _Members] = {}
    for module, slots in ledger.modules(_SLOTS).items():
        name = re.sub(r"^mixlora\.", "model.", module)
        with ledger.attempt(f"{name}.weight"):
            members[name] = _members(_Scales(ledger, name), slots)
            ledger.use(slots.values())  # a router, the second name of a factor, members that heads= leaves out
    for name, target in targets(ledger, {name: item.each[0].shape for name, item in members.items()}).items():
        with ledger.attempt(target.name, members[name].each[0].shape):
            _add(ledger, target, members[name])
    for name in ledger.tuned.tensors:
        if name.endswith("moe_gate.weight"):
            ledger.skip(name, "a router's weight, which chooses experts and changes none")


@dataclass(frozen=True)
class _Scales:
    """s for the pairs of one module."""

    ledger: Ledger
    module: str

    @property
    def config(self) -> Config:
        """The adapter's config."""
        return self.ledger.config

    def put(self, terms: tuple[Term, ...], parts: int = 1) -> tuple[Term, ...]:
        """The pairs with s in them, where the config's r counts `parts` of them."""
        s = self.ledger.scale_of(self.module, terms[0].right.shape[0] * parts)
        return tuple(replace(term, scale=s) for term in terms)


def _members(scales: _Scales, slots: Slots) -> _Members:
    """The members of one module by its tensors' names."""
    slots.real(*slots)
    names = set(slots)
    if any("loraA" in name or "loraB" in name for name in names):
        return _moelora(scales, slots)
    if names & {"lora_lambdas", "lora_B_w"}:
        return _mtl(scales, slots)
    if any(name.startswith("experts.") for name in names):
        return _mixlora(scales, slots)
    if any(re.fullmatch(r"lora_[AB]\d+", name) for name in names):
        if "lora_B" in names:
            where = scales.ledger.where
            raise UnsupportedFormatError(f"{where} holds an ALoRA (several A, one B), which is not supported")
        return _loramoe(scales, slots)
    if names != {"lora_A", "lora_B"}:
        raise Refusal(f"{', '.join(sorted(names))} of {scales.module} are no pair of factors")
    if len(slots["lora_A"].shape) == 3:
        return _stacked(scales, slots)
    return _Members((Factors(scales.put(_pairs((slots["lora_A"],), (slots["lora_B"],)))),), "")


def _numbered(slots: Mapping[str, TensorRef], pattern: str) -> tuple[TensorRef, ...]:
    """Tensors 0, 1, …, whose slots fit the pattern with the index as its group."""
    by_number = {}
    for slot, ref in slots.items():
        match = re.fullmatch(pattern, slot)
        if match:
            by_number[int(match[1])] = ref
    if sorted(by_number) != list(range(len(by_number))) or not by_number:
        raise Refusal(f"members {sorted(by_number)} of {pattern.partition('(')[0]} are not 0, 1, …")
    return tuple(by_number[index] for index in sorted(by_number))


def _pairs(downs: tuple[TensorRef, ...], ups: tuple[TensorRef, ...]) -> tuple[Term, ...]:
    """(Bᵢ, Aᵢ) of equal shapes for all i, without their scale."""
    shapes = {(up.shape, down.shape) for up, down in zip(ups, downs, strict=False)}
    if len(downs) != len(ups) or len(shapes) != 1:
        raise Refusal(f"{len(downs)} A and {len(ups)} B of the shapes {sorted(shapes)} are no equal pairs")
    up, down = next(iter(shapes))
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or not down[0]:
        raise Refusal(f"B {list(up)} and A {list(down)} cannot be multiplied")
    return tuple(Term((b,), a) for b, a in zip(ups, downs, strict=True))


def _mean(terms: tuple[Term, ...]) -> Factors:
    return Factors(tuple(replace(term, scale=term.scale / len(terms)) for term in terms))


def _loramoe(scales: _Scales, slots: Slots) -> _Members:
    terms = scales.put(_pairs(_numbered(slots, r"lora_A(\d+)"), _numbered(slots, r"lora_B(\d+)")))
    count = scales.config.get("lora_nums")
    if count not in (None, len(terms)):
        raise Refusal(f"the config says {count} experts, the file has {len(terms)}")
    routed = "routed experts, no static ΔW exists" if "lora_route" in slots else "experts"
    return _Members(tuple(Factors((t,)) for t in terms), routed, {"mean": _mean(terms), "sum": Factors(terms)})


def _mixlora(scales: _Scales, slots: Slots) -> _Members:
    if set(slots) & {"lora_A", "lora_B"}:
        raise Refusal("factors for all tokens and factors per expert lie side by side")
    terms = scales.put(_pairs(_numbered(slots, r"experts\.(\d+)\.lora_A"), _numbered(slots, r"experts\.(\d+)\.lora_B")))
    why = "each expert is an MLP of its own, and a router mixes what comes out of them (MixLoRA)"
    return _Members(tuple(Factors((t,)) for t in terms), "experts of the MLP", why=why)


def _moelora(scales: _Scales, slots: Slots) -> _Members:
    """Every expert is stored under two names, of which the shorter is dropped."""
    short = {
        re.sub(r"^(lora_[AB])\.(?:[^.]+\.)?(lora[AB]\.\d+)(?:\.mlp)?$", r"\1.\2", n): ref for n, ref in slots.items()
    }
    short = {re.sub(r"^(lora_task_embedding|lora_gate)\..*$", r"\1", name): ref for name, ref in short.items()}
    pairs = _pairs(_numbered(short, r"lora_A\.loraA\.(\d+)"), _numbered(short, r"lora_B\.loraB\.(\d+)"))
    terms = scales.put(pairs, parts=len(pairs))
    embedding, gate = short.get("lora_task_embedding"), short.get("lora_gate")
    if embedding is None or gate is None:
        raise Refusal(
            "the gate or the tasks' embedding of this MOELoRA is not in the file, so its experts' weights are unknown"
        )
    if len(embedding.shape) != 2 or not embedding.numel or gate.shape != (len(terms), embedding.shape[1]):
        there = f"{len(terms)} experts and tasks {list(embedding.shape)}"
        raise Refusal(f"the gate {list(gate.shape)} does not fit {there}")
    each = tuple(Weighted(terms, embedding.item(task), gate) for task in range(embedding.shape[0]))
    return _Members(each, "tasks", why="every task weighs the experts its own way (MOELoRA)")


def _mtl(scales: _Scales, slots: Slots) -> _Members:
    missing = sorted({"lora_A", "lora_B", "lora_lambdas", "lora_B_w"} - set(slots))
    if missing:
        raise Refusal(f"{missing[0]} of this MTL-LoRA is missing")
    down, ups, middle, logits = (slots[name] for name in ("lora_A", "lora_B", "lora_lambdas", "lora_B_w"))
    down = down.item(0) if len(down.shape) == 3 and down.shape[0] == 1 else down
    tasks, rank = (logits.shape or (0,))[0], (down.shape or (0,))[0]
    fits = len(down.shape) == 2 and len(ups.shape) == 3 and ups.shape[2] == rank and rank > 0 and tasks > 0
    if not fits or logits.shape != (tasks, ups.shape[0]) or middle.shape not in ((tasks, rank), (tasks, rank, rank)):
        shapes = {name: list(ref.shape) for name, ref in slots.items()}
        raise Refusal(f"the tensors of this MTL-LoRA do not fit: {shapes}")
    temperature = _temperature(scales.config) if ups.shape[0] > 1 else 1.0
    each = []
    for task in range(tasks):
        inner = middle.item(task)
        diagonal, full = (inner, None) if len(inner.shape) == 1 else (None, inner)
        terms = tuple(Term((ups.item(b),), down, inner_scale=diagonal, core=full) for b in range(ups.shape[0]))
        each.append(Weighted(scales.put(terms), logits.item(task), None, temperature))
    return _Members(tuple(each), "tasks", why="every task has its own mixture of B and its own Λ (MTL-LoRA)")


def _temperature(config: Config) -> float:
    """τ of MTL-LoRA's softmax, which its trainer does not save."""
    if "B_scale" not in config:
        raise Refusal(
            "the temperature of this MTL-LoRA is not stored: put it into adapter_config.json as B_scale, with r and α"
        )
    temperature = config.real("B_scale")
    if temperature <= 0:
        raise Refusal(f"B_scale = {temperature:g} is no temperature")
    return temperature


def _stacked(scales: _Scales, slots: Slots) -> _Members:
    downs, ups = slots["lora_A"], slots["lora_B"]
    if len(ups.shape) != 3 or not downs.shape[0] or downs.shape[0] != ups.shape[0]:
        raise Refusal(f"lora_A {list(downs.shape)} and lora_B {list(ups.shape)} are no stacks of pairs")
    items = [tuple(ref.item(i) for i in range(ref.shape[0])) for ref in (downs, ups)]
    terms = scales.put(_pairs(items[0], items[1]))
    why = "stacked factors without a scaling may be particles, of which one is drawn, or modules that add up"
    return _Members(tuple(Factors((t,)) for t in terms), "stacked pairs", {"sum": Factors(terms)}, why)


def _add(ledger: Ledger, target: Target, members: _Members) -> None:
    heads, count = ledger.heads, len(members.each)
    if not members.noun:
        add_update(ledger, target, members.each[0])
        return
    if heads in ("mean", "sum"):
        update = members.together.get(str(heads))
        if update is None:
            why = f"{members.why}: pass heads= (--heads) an index from 0 to {count - 1}, or each"
            known = " or ".join(members.together)
            raise Refusal(why + (f", or {known}" if known else ""))
        add_update(ledger, target, update, note=f"{heads} of {count} {members.noun}")
        return
    if heads != "each" and (not isinstance(heads, int) or not 0 <= heads < count):
        raise SelectionError(
            f"{target.name} has {count} {members.noun}, 0 to {count - 1}; heads={heads!r} is none of them"
        )
    for index in range(count) if heads == "each" else [int(heads)]:
        part = replace(target, name=f"{target.name}[head{index}]")
        add_update(ledger, part, members.each[index], note=f"number {index} of {count} {members.noun}", whole=True)
