"""LoRA on stacked expert weights, as PEFT's `target_parameters` saves it: a ΔW for every expert.

The factors of all experts of a parameter lie in one A (r·E, a) and one B (b, r·E). The rows of A are
expert by expert, the columns of B rank by rank: row e·r + i of A belongs to column i·E + e of B. Of two
parameters of one module the first is saved under `<module>.base_layer`, the second under `<module>`;
nothing in the file says which is which, so shapes decide, and what they leave open is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from spectra.deltas.recipes import Term
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import experts, renames
from spectra.models.architectures import Cut, model_type, repeated
from spectra.sources.adapter import Refusal, Slots, Target, add_factored
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger
from spectra.sources.targets import align_file

# Architectures that store an expert as (in, out) and tell PEFT so, which then takes A and B the right way round.
_TOLD_PEFT = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
# Up to 0.18 PEFT took the last axis of every 3-D parameter for the output; 0.18.2.dev0 names both layouts.
_SWAPPED_UNTIL = (0, 18)
# The parts of a stacked parameter, in the order in which transformers joins them.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class _Level:
    """The factors that one wrapper around a module holds: A (r·E, a) and B (b, r·E)."""

    down: TensorRef
    up: TensorRef

    @property
    def size(self) -> tuple[int, int]:
        """(b, a)."""
        return (self.up.shape[0], self.down.shape[1])


@dataclass(frozen=True)
class _Piece:
    """A matrix of the base, in Linear orientation, and the rows of one expert's ΔW that belong to it; None for all."""

    target: Target
    cut: Cut | None = None


@dataclass(frozen=True)
class _Stored:
    """A parameter as the base holds it.

    Attributes:
        size: the last two axes that PEFT met in memory.
        experts: the matrices of each expert.
        kind: the architecture.
        transposed: whether those axes are (in, out).
    """

    size: tuple[int, int]
    experts: tuple[tuple[_Piece, ...], ...]
    kind: str = ""
    transposed: bool = False


def parameters_of(config: Config, module: str) -> list[str]:
    """The parameters of a module that `target_parameters` means, by PEFT's rule: a suffix of whole words."""
    listed = config.get("target_parameters")
    owner = owner_of(module)
    names = []
    for entry in listed if isinstance(listed, list) else []:
        path, _, parameter = str(entry).rpartition(".")
        if owner == path or owner.endswith(f".{path}"):
            names.append(parameter)
    return sorted(set(names))


def owner_of(module: str) -> str:
    """The module that holds the parameters, without PEFT's wrappers.

    >>> owner_of("layers.0.mlp.experts.base_layer")
    'layers.0.mlp.experts'
    """
    return re.sub(r"\.base_layer(?=\.|$)", "", module)


def add_stacks(ledger: Ledger, modules: Mapping[str, Slots]) -> None:
    """Enter every expert's ΔW for modules whose parameters are named in `target_parameters`."""
    owners: dict[str, dict[int, Slots]] = {}
    for module, slots in modules.items():
        owners.setdefault(owner_of(module), {})[module.count(".base_layer")] = slots
    wanted = {owner: parameters_of(ledger.config, owner) for owner in owners}
    stored = _stored(ledger, wanted)
    for owner, by_depth in owners.items():
        with ledger.attempt(f"{owner}.{'+'.join(wanted[owner])}"):
            levels = [_level(by_depth[depth]) for depth in sorted(by_depth, reverse=True)]  # the first is inside
            chosen = _assign(ledger, levels, wanted[owner], stored.get(owner, {}))
            for parameter, level in chosen.items():
                with ledger.attempt(f"{owner}.{parameter}"):
                    _add(ledger, f"{owner}.{parameter}", level, stored.get(owner, {}).get(parameter))


def _level(slots: Slots) -> _Level:
    odd = sorted(set(slots) - {"lora_A", "lora_B"})
    if odd:
        raise Refusal(f"{odd[0]} beside the factors of a stacked parameter is not known")
    down, up = slots.real("lora_A", "lora_B")
    if len(down.shape) != 2 or len(up.shape) != 2 or up.shape[1] != down.shape[0]:
        raise Refusal(f"lora_A {list(down.shape)} and lora_B {list(up.shape)} cannot be multiplied")
    if not down.numel or not up.numel:
        raise Refusal(f"lora_A {list(down.shape)} and lora_B {list(up.shape)} are empty")
    return _Level(down, up)


def _stored(ledger: Ledger, wanted: Mapping[str, list[str]]) -> dict[str, dict[str, _Stored]]:
    """owner → parameter → where the base has it; empty without a base."""
    base = ledger.base
    if base is None or not wanted:
        return {}
    stacks = _apart(base)
    shapes = {name: ref.shape for name, ref in base.tensors.items()} | dict.fromkeys(stacks, (0,))
    full = [f"{owner}.{parameter}" for owner, parameters in wanted.items() for parameter in parameters]
    names = align_file(ledger, dict.fromkeys(full), shapes)
    found: dict[str, dict[str, _Stored]] = {}
    for own in full:
        owner, _, parameter = own.rpartition(".")
        item = stacks.get(names[own]) or _together(base, names[own], ledger.split)
        if item is not None:
            found.setdefault(owner, {})[parameter] = item
    return found


def _together(base: Folder, name: str, split: bool) -> _Stored | None:
    """A parameter that the base holds under its own name: a stack of a known layout, or one matrix."""
    ref, config = base.tensors.get(name), base.config_of(name)
    if ref is None:
        return None
    if len(ref.shape) == 2 and not experts.is_stacked(config, name):
        return _Stored((ref.shape[0], ref.shape[1]), ((_Piece(Target(name, ref, ref)),),))
    kind = model_type(config, name)
    layout = experts.STACKS.get(kind)
    if layout is None or len(ref.shape) != 3 or not ref.numel:
        return None
    members = []
    for index in range(ref.shape[0]):
        matrix = ref.item(index).T if layout.transposed else ref.item(index)
        rows = matrix.shape[0]
        groups = rows // 2 if layout.interleaved else 1
        halves = repeated(rows, groups, {"gate": 1, "up": 1}) if split and experts.holds_gate_and_up(name) else {}
        pieces = [_Piece(Target(f"{name}[{index}][{half}]", cut(matrix), ref), cut) for half, cut in halves.items()]
        members.append(tuple(pieces) or (_Piece(Target(f"{name}[{index}]", matrix, ref)),))
    return _Stored((ref.shape[1], ref.shape[2]), tuple(members), kind, layout.transposed)


def _apart(base: Folder) -> dict[str, _Stored]:
    """Stack → its experts, for a base that keeps every expert's matrices apart."""
    found: dict[str, dict[int, dict[str, Target]]] = {}
    for name, ref in base.tensors.items():
        key = experts.single(base.config_of(name), name)
        stack = experts.stack_of(key) if key else None
        if key is None or stack is None or len(ref.shape) != 2:
            continue
        index, part, _ = key.rsplit(".", 3)[1:]
        stack = renames.current(base.config_of(name), stack)
        found.setdefault(stack, {}).setdefault(int(index), {})[part] = Target(name, ref, ref)
    stacks = {}
    for stack, members in found.items():
        parts = _PARTS[stack.rpartition(".")[2]]
        if sorted(members) != list(range(len(members))) or any(set(each) != set(parts) for each in members.values()):
            continue
        pieces = tuple(_joined([members[index][part] for part in parts]) for index in range(len(members)))
        rows, columns = _size(pieces[0])
        if all(_size(each) == (rows, columns) for each in pieces):
            stacks[stack] = _Stored((rows, columns), pieces)
    return stacks


def _joined(parts: list[Target]) -> tuple[_Piece, ...]:
    """Matrices that lie below one another in the stack."""
    pieces, start = [], 0
    for target in parts:
        stop = start + (target.ref.shape[0] if target.ref else 0)
        pieces.append(_Piece(target, _Rows(start, stop)))
        start = stop
    return tuple(pieces)


@dataclass(frozen=True)
class _Rows:
    start: int
    stop: int

    def __call__(self, ref: TensorRef) -> TensorRef:
        return ref.rows(self.start, self.stop)


def _size(pieces: tuple[_Piece, ...]) -> tuple[int, int]:
    refs = [piece.target.ref for piece in pieces if piece.target.ref is not None]
    return (sum(ref.shape[0] for ref in refs), refs[0].shape[1])


def _assign(
    ledger: Ledger, levels: list[_Level], wanted: list[str], stored: Mapping[str, _Stored]
) -> dict[str, _Level]:
    """parameter → its factors; refused where that cannot be known."""
    if ledger.base is None:
        if _swapped(ledger.config) is not False:
            version = ledger.config.get("peft_version") or "0.17 or older"
            raise Refusal(
                f"PEFT {version} may have swapped in and out of the factors of stacked parameters: pass base= (--base)"
            )
        return _assign_alone(levels, wanted)
    there = [parameter for parameter in wanted if parameter in stored]
    if len(there) != len(levels):
        raise Refusal(f"{len(levels)} pairs of factors for the parameters {wanted}, of which the base has {there}")
    fitting = [
        order
        for order in itertools.permutations(there)
        if all(_fits(level, stored[parameter]) for level, parameter in zip(levels, order, strict=True))
    ]
    if len(fitting) != 1:
        shapes = {parameter: list(stored[parameter].size) for parameter in there}
        sizes = [f"A {list(level.down.shape)}, B {list(level.up.shape)}" for level in levels]
        raise Refusal(f"the factors {'; '.join(sizes)} fit the parameters {shapes} in {len(fitting)} ways")
    return dict(zip(fitting[0], levels, strict=True))


def _assign_alone(levels: list[_Level], wanted: list[str]) -> dict[str, _Level]:
    """The same without a base: certain for one parameter, and for the two halves of an MLP by their shapes."""
    if len(levels) == len(wanted) == 1:
        return {wanted[0]: levels[0]}
    if len(levels) == 2 and wanted == ["down_proj", "gate_up_proj"]:
        first, last = levels
        if first.size[0] == 2 * last.size[1] and first.size[1] == last.size[0]:
            return {"gate_up_proj": first, "down_proj": last}
    raise Refusal(
        f"the file does not say which of its {len(levels)} pairs of factors is for which of {wanted}: "
        "pass base= (--base)"
    )


def _fits(level: _Level, stored: _Stored) -> bool:
    return stored.size in (level.size, level.size[::-1]) and level.down.shape[0] % len(stored.experts) == 0


def _swapped(config: Config) -> bool | None:
    """Whether the adapter is from a PEFT that swapped in and out of 3-D parameters; None where that is not known."""
    version = re.match(r"(\d+)\.(\d+)(?:\.\d+)?(\.?dev)?", str(config.get("peft_version") or "0.17"))
    if version is None or (version[3] and (int(version[1]), int(version[2])) == _SWAPPED_UNTIL):
        return None
    return (int(version[1]), int(version[2])) <= _SWAPPED_UNTIL


def _crossed(config: Config, level: _Level, stored: _Stored) -> bool | None:
    """Whether ΔW in Linear orientation is (B·A)ᵀ; None where that cannot be known."""
    crossed: bool | None = stored.size != level.size
    if level.size[0] == level.size[1]:
        crossed = _swapped(config) and len(stored.experts) > 1
        crossed = stored.kind in _TOLD_PEFT if crossed is False else crossed
    return None if crossed is None else crossed != stored.transposed


def _add(ledger: Ledger, name: str, level: _Level, stored: _Stored | None) -> None:
    """Enter the ΔW of every expert of one parameter."""
    s, rank = ledger.config.scaling(name)
    rows = level.down.shape[0]
    count = len(stored.experts) if stored else rows // rank
    if rows != rank * count or not count:
        there = f"the factors in {ledger.where} have {rows} rows for {count} experts"
        raise Refusal(f"the config says r = {rank} for {name}, {there}")
    crossed = _crossed(ledger.config, level, stored) if stored else False
    if crossed is None:
        version = ledger.config.get("peft_version")
        raise Refusal(f"PEFT {version} is between two layouts, and a square expert does not show which")
    for index in range(count):
        down = level.down.rows(index * rank, (index + 1) * rank)
        up = level.up.reshape(level.up.shape[0], rank, count).permute(2, 0, 1).item(index)
        term = Term((down.T,), up.T, s) if crossed else Term((up,), down, s)
        alone = (_Piece(Target(name if count == 1 else f"{name}[{index}]")),)
        for piece in stored.experts[index] if stored else alone:
            left = piece.cut(term.lefts[0]) if piece.cut else term.lefts[0]
            add_factored(ledger, piece.target, [replace(term, lefts=(left,))], whole=True)
