"""Layers that stand under other numbers in the tuned model, found by their content.

Depth up-scaling (LLaMA-Pro, SOLAR) and pruning insert and drop layers, so that layer 17 of the tuned
model is another layer's copy. Same names then mean nothing: unmoved weights would seem to have
changed by 1.4 of their norm. Where the numbers of layers differ, a few rows of one matrix per layer
are compared instead, and the layers that hold the same numbers are paired.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.models.matrices import Weight

_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<number>[0-9]{1,6})\.(?P<rest>.+)")
Layers = dict[int, dict[str, str]]


@dataclass
class Renumbered:
    """Two models' weights under shared names, after layers that moved were paired by content.

    Attributes:
        tuned: shared name → weight; layers that have no counterpart are gone.
        base: shared name → weight; a layer that moved is under the tuned model's number and name.
        notes: shared name → what the matrix was compared with, for layers that moved.
        tuned_only: name → why it has no counterpart in the base.
        base_only: name → why it has none in the tuned model.
        warnings: one line for each stack of layers that was paired by content.
    """

    tuned: dict[str, Weight]
    base: dict[str, Weight]
    notes: dict[str, str] = field(default_factory=dict)
    tuned_only: dict[str, str] = field(default_factory=dict)
    base_only: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def renumbered(tuned: Mapping[str, Weight], base: Mapping[str, Weight]) -> Renumbered:
    """Pair the layers of each stack whose number of layers differs, by what they hold.

    Layers of equal content are paired. A layer without an equal one, whose neighbours moved by one
    and the same number, moved with them; any other has no counterpart. A stack in which no layer has
    an equal one is left as it is. Reads three rows of one matrix per layer, and of every matrix of a
    layer of which the tuned model has several copies.

    Args:
        tuned: shared name → weight, both sides under the names that pairing found.
        base: the same for the base.
    """
    result = Renumbered(dict(tuned), dict(base))
    after, before = _stacks(tuned), _stacks(base)
    for stack in after.keys() & before.keys():
        if len(after[stack]) != len(before[stack]):
            _pair_stack(result, stack, after[stack], before[stack])
    return result


def _stacks(weights: Mapping[str, Weight]) -> dict[str, Layers]:
    """Stack of layers → number → the rest of a name → the shared name."""
    stacks: dict[str, Layers] = {}
    for key in weights:
        parsed = _LAYER.fullmatch(key)
        if parsed:
            layer = stacks.setdefault(parsed["stack"], {}).setdefault(int(parsed["number"]), {})
            layer[parsed["rest"]] = key
    return stacks


def _pair_stack(result: Renumbered, stack: str, after: Layers, before: Layers) -> None:
    tuned, base = dict(result.tuned), dict(result.base)
    equal = _equal_layers(tuned, base, after, before)
    if not equal:
        return
    paired = _with_neighbours(equal, after, before)
    copies = _copies(tuned, base, after, before, equal)
    for layer in before.values():
        for key in layer.values():
            del result.base[key]
    for number, layer in after.items():
        source = before.get(paired.get(number, -1), {})
        for rest, key in layer.items():
            if number not in paired:
                _leave_out(result, key, "in a layer that was added: no layer of the base holds the same")
            elif number in copies and not (rest in source and _same(tuned[key], base[source[rest]])):
                original = f"{stack}{paired[number]}"
                _leave_out(result, key, f"in a layer that was added: a copy of the base's {original}, but for this")
            elif rest in source:
                _enter(result, key, base[source[rest]], number, paired[number])
    for number in before.keys() - set(paired.values()):
        names = [base[key].name for key in before[number].values()]
        result.base_only.update(dict.fromkeys(names, "in a layer that the tuned model does not have"))
    result.warnings.append(_said(stack, after, before, paired))


def _leave_out(result: Renumbered, key: str, why: str) -> None:
    result.tuned_only[result.tuned.pop(key).name] = why


def _enter(result: Renumbered, key: str, weight: Weight, number: int, original: int) -> None:
    """Put a weight of the base's layer `original` at a name of the tuned model's layer `number`."""
    if number != original:
        result.notes[key] = f"compared with {weight.name} of the base: the layers were renumbered"
        weight = replace(weight, name=re.sub(r"(?<![^.])[0-9]+(?=\.)", str(number), weight.name, count=1))
    result.base[key] = weight


def _said(stack: str, after: Layers, before: Layers, paired: Mapping[int, int]) -> str:
    moved = sorted(number for number, other in paired.items() if number != other)
    example = f", for example {stack}{moved[0]} with the base's {stack}{paired[moved[0]]}" if moved else ""
    lost = len(after) - len(paired)
    rest = f"; {lost} of the tuned model {'has' if lost == 1 else 'have'} no counterpart" if lost else ""
    return f"the base has {len(before)} layers {stack}N, the tuned model {len(after)}: paired by content{example}{rest}"


def _equal_layers(
    tuned: Mapping[str, Weight], base: Mapping[str, Weight], after: Layers, before: Layers
) -> dict[int, int]:
    """Tuned layer → the base's layer that holds the same, as far as the rows of one matrix tell."""
    rest = _probe(tuned, after, base, before)
    if rest is None:
        return {}
    held: dict[bytes, list[int]] = {}
    for number in sorted(before):
        rows = _rows(base[before[number][rest]].ref)
        if rows is not None:
            held.setdefault(rows, []).append(number)
    equal = {}
    for number in sorted(after):
        rows = _rows(tuned[after[number][rest]].ref)
        candidates = held.get(rows, []) if rows is not None else []
        if candidates:
            equal[number] = number if number in candidates else candidates[0]
    return equal


def _probe(tuned: Mapping[str, Weight], after: Layers, base: Mapping[str, Weight], before: Layers) -> str | None:
    """The smallest matrix that every layer of both sides has, by the rest of its name."""
    layers = [(tuned, layer) for layer in after.values()] + [(base, layer) for layer in before.values()]
    common = set.intersection(*(set(layer) for _, layer in layers))
    sizes = {}
    for rest in common:
        weights = [weights[layer[rest]] for weights, layer in layers]
        refs = [weight.ref for weight in weights if weight.ref is not None and not weight.skip]
        if len(refs) == len(layers) and all(ref.is_float and len(ref.shape) == 2 for ref in refs):
            sizes[rest] = refs[0].numel
    return min(sizes, key=lambda rest: (sizes[rest], rest), default=None)


def _rows(ref: TensorRef | None) -> bytes | None:
    """Three rows of a stored matrix, as one comparable value; None where they tell nothing.

    The stored orientation is read, so that rows of a file lie together; the views go into the value.
    """
    if ref is None:
        return None
    stored = replace(ref, views=(), shape=ref.stored) if ref.stored else ref
    if not stored.numel:
        return None
    height = stored.shape[0]
    try:
        parts = [stored.rows(row, row + 1).read_float64() for row in sorted({0, height // 2, height - 1})]
    except SourceError:
        return None
    if all(bool((part == part.flatten()[0]).all()) for part in parts):  # zeros and ones are no evidence
        return None
    values = b"".join(part.contiguous().numpy().tobytes() for part in parts)
    return repr((ref.shape, ref.views)).encode() + values


def _same(tuned: Weight, base: Weight) -> bool:
    """Whether a few rows of two matrices, or two vectors, are equal; vectors are never told apart."""
    if tuned.skip or tuned.ref is None:
        return True
    rows = _rows(tuned.ref)
    return rows is not None and rows == _rows(base.ref)


def _with_neighbours(equal: Mapping[int, int], after: Layers, before: Layers) -> dict[int, int]:
    """The equal layers, and those between two that moved by the same number, or beyond the last of them."""
    paired, claimed = dict(equal), set(equal.values())
    for number in sorted(after.keys() - equal.keys()):
        below = [other for other in equal if other < number]
        above = [other for other in equal if other > number]
        steps = {equal[other] - other for other in ([max(below)] if below else []) + ([min(above)] if above else [])}
        target = number + steps.pop() if len(steps) == 1 else -1
        if target in before and target not in claimed:
            paired[number] = target
            claimed.add(target)
    return paired


def _copies(
    tuned: Mapping[str, Weight], base: Mapping[str, Weight], after: Layers, before: Layers, equal: Mapping[int, int]
) -> set[int]:
    """Of the tuned layers that equal one layer of the base, all but the one that equals it most, or the first such."""
    added: set[int] = set()
    for target in set(equal.values()):
        numbers = sorted(number for number, other in equal.items() if other == target)
        if len(numbers) < 2:
            continue
        shared = {
            number: sum(
                _same(tuned[key], base[before[target][rest]])
                for rest, key in after[number].items()
                if rest in before[target]
            )
            for number in numbers
        }
        first = max(numbers, key=lambda number: (shared[number], -number))
        added |= set(numbers) - {first}
    return added
