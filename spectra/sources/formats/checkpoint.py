"""Full checkpoints: ΔW = tuned − base, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spectra.files.folder import Folder
from spectra.models import experts, tied
from spectra.models.matrices import Weight, stacks_experts, weights_of
from spectra.models.pairing import align
from spectra.models.renumbered import renumbered
from spectra.sources import recognised
from spectra.sources.difference import subtract
from spectra.sources.ledger import Ledger
from spectra.sources.targets import Target


def matches(folder: Folder) -> bool:
    """Anything with tensors that is not an adapter, nor has the factors or the file's name of one without a config.

    MLX writes an adapter's config beside weights that were trained whole, too; it says so.
    """
    if recognised.trained_whole(folder):
        return not recognised.has_factors(folder)
    return not recognised.is_no_model(folder) and not recognised.has_factors(folder)


def read(ledger: Ledger) -> None:
    """Pair every weight of the tuned model with the base's.

    Raises:
        SourceError: the two share no weight, or fit in several ways.
    """
    pairs = _paired(ledger, ledger.tuned, ledger.need_base())
    for key in pairs.base:
        _base_weight(pairs, key)
    for key in pairs.tuned:
        if key not in pairs.base:
            _tuned_weight(pairs, key)
    _refuse_other_names(pairs)
    ledger.named.update(ledger.tuned.tensors)  # each is in a pair or in the coverage
    ledger.owners.update(dict.fromkeys(ledger.tuned.broken, ""))


@dataclass
class _Pairs:
    """Both sides' weights under the same names, and what stands for what."""

    ledger: Ledger
    tuned_folder: Folder
    base_folder: Folder
    tuned: dict[str, Weight]
    base: dict[str, Weight]
    stands_for: dict[str, list[str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    moved: dict[str, str] = field(default_factory=dict)

    def config_of(self, name: str) -> Mapping[str, Any]:
        return self.base_folder.config_of(name) or self.tuned_folder.config_of(name)


def _paired(ledger: Ledger, tuned: Folder, base: Folder) -> _Pairs:
    stacked = (stacks_experts(tuned, base), stacks_experts(base, tuned))
    apart = ledger.split or stacked[0] != stacked[1]
    if apart and not ledger.split and any(stacked):
        ledger.warnings.append("experts are stacked on one side only, so gate and up are reported apart")
    tuned_weights = weights_of(tuned, base, split_experts=apart)
    base_weights = weights_of(base, tuned, split_experts=apart)
    names, rule = align(_shapes(tuned_weights), _shapes(base_weights))
    if rule:
        ledger.warnings.append(rule)
    joined = renumbered({names[key]: weight for key, weight in tuned_weights.items()}, base_weights)
    ledger.tuned_only.update(joined.tuned_only)
    ledger.base_only.update(joined.base_only)
    ledger.warnings += joined.warnings
    pairs = _Pairs(ledger, tuned, base, joined.tuned, joined.base, moved=joined.notes)
    _note_tied(pairs)
    return pairs


def _shapes(weights: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    return {key: weight.shape for key, weight in weights.items()}


def _note_tied(pairs: _Pairs) -> None:
    """Which names each weight stands for: those that are stored as it, and a head that neither file stores."""
    for weights in (pairs.base, pairs.tuned):
        key_of = {weight.name: key for key, weight in weights.items()}
        for key, weight in weights.items():
            other = (pairs.tuned if weights is pairs.base else pairs.base).get(key)
            if weight.same_as and (other is None or other.same_as or other.name == weight.same_as):
                listed = pairs.stands_for.setdefault(key_of.get(weight.same_as, weight.same_as), [])
                listed += [weight.name] if weight.name not in listed else []
    heads = [key for key in (*pairs.base, *pairs.tuned) if tied.is_head(key)]
    embedding = _embedding(pairs.base)
    if not heads and embedding and tied.ties(pairs.base_folder.config) and tied.ties(pairs.tuned_folder.config):
        pairs.stands_for[embedding] = ["the output head"]


def _embedding(weights: Mapping[str, Weight]) -> str | None:
    return tied.embedding_in({key: weight.same_as for key, weight in weights.items() if weight.ref is not None})


def _base_weight(pairs: _Pairs, key: str) -> None:
    """Enter one name of the base."""
    ledger, base, tuned = pairs.ledger, pairs.base[key], pairs.tuned.get(key)
    stack = pairs.tuned.get(experts.stack_of(key) or "")
    if tuned is not None and base.same_as and tuned.same_as:
        ledger.skipped[base.name] = f"the same tensor as {base.same_as}, and reported as that"
    elif tuned is not None:
        _pair(pairs, key, base, tuned)
    elif base.same_as:
        ledger.skipped[base.name] = f"the same tensor as {base.same_as}, and reported as that"
    elif stack is not None and stack.ref is None:
        pairs.used.add(experts.stack_of(key) or "")
        ledger.refuse(base.name, base.shape, stack.status, stack.why)
    elif base.ref is None and any(experts.stack_of(other) == key for other in pairs.tuned):
        ledger.refuse(base.name, (), base.status, base.why)
    elif not _with_embedding(pairs, base.name, key, base, "tuned"):
        ledger.base_only[base.name] = "not in the tuned model"


def _tuned_weight(pairs: _Pairs, key: str) -> None:
    """Enter one name that only the tuned model has."""
    tuned = pairs.tuned[key]
    if tuned.same_as:
        pairs.ledger.skipped[tuned.name] = f"the same tensor as {tuned.same_as}, and reported as that"
    elif key not in pairs.used and not _with_embedding(pairs, key, key, tuned, "base"):
        pairs.ledger.tuned_only[tuned.name] = "not in the base"


def _refuse_other_names(pairs: _Pairs) -> None:
    """Give a row to each matrix of which the base's layer has others in its place: it has an update, and no number.

    Most often q, k and v, or gate and up, are one weight on one side and apart on the other.
    """
    ledger = pairs.ledger
    there: dict[str, list[str]] = {}
    for name in ledger.base_only:
        there.setdefault(_module_around(name), []).append(name)
    for weight in pairs.tuned.values():
        if weight.name not in ledger.tuned_only or not weight.name.endswith(".weight") or len(weight.shape) != 2:
            continue
        others = there.get(_module_around(weight.name), [])
        if others:
            named = ", ".join(name.removesuffix(".weight").rpartition(".")[2] for name in sorted(others))
            why = f"not in the base, which has {named} there: fused on one side only, or of another architecture"
            ledger.lack(weight.name, why, weight.shape)


def _module_around(name: str) -> str:
    """What holds a layer's own modules, for names of layers; a name of its own for any other weight.

    >>> _module_around("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn'
    """
    around = name.removesuffix(".weight").rpartition(".")[0]
    in_a_layer = name.endswith(".weight") and any(word.isdigit() for word in around.split("."))
    return around if in_a_layer else name


def _with_embedding(pairs: _Pairs, name: str, key: str, head: Weight, side: str) -> bool:
    """Compare a head with the embedding that the other side ties it to; False if that is not what this is."""
    folder, weights = (pairs.base_folder, pairs.base) if side == "base" else (pairs.tuned_folder, pairs.tuned)
    embedding = _embedding(weights)
    if not tied.is_head(key) or head.ref is None or embedding is None or not tied.ties(folder.config):
        return False
    other = weights[embedding]
    if other.ref is None or not tied.may_be(key, head.shape, other.shape):
        return False
    tuned, base = (head, other) if side == "base" else (other, head)
    note = f"the {side} model's head is tied to {other.name}: compared with that"
    _subtract(pairs, name, tuned, base, note)
    return True


def _subtract(pairs: _Pairs, name: str, tuned: Weight, base: Weight, note: str) -> None:
    assert tuned.ref is not None
    target = Target(base.name, base.ref, base.stored)
    subtract(pairs.ledger, name, tuned.ref, target, pairs.config_of(name), note)


def _pair(pairs: _Pairs, key: str, base: Weight, tuned: Weight) -> None:
    """Enter one name that both models have."""
    ledger = pairs.ledger
    if base.ref is None or tuned.ref is None:
        lost = base if base.ref is None else tuned
        if lost.status == "unreadable" and (base.skip or tuned.skip):
            ledger.skipped[base.name] = f"{base.skip or tuned.skip}; {lost.why}"
        else:
            ledger.refuse(base.name, base.shape or tuned.shape, lost.status, lost.why)
        return
    if base.skip and tuned.skip:
        ledger.skipped[base.name] = base.skip
        return
    if base.skip or tuned.skip:
        side, odd = ("base", base) if base.skip else ("tuned", tuned)
        if base.shape == tuned.shape:
            ledger.refuse(base.name, base.shape, "unsupported", f"only the {side} model's is left out: {odd.skip}")
            return
        why = f"tuned is {list(tuned.shape)}, base is {list(base.shape)}"
        ledger.refuse(base.name, base.shape, "shape_mismatch", why)
        return
    notes = [pairs.moved[key]] if key in pairs.moved else []
    notes += [f"also stands for {', '.join(pairs.stands_for[key])} (tied)"] if key in pairs.stands_for else []
    for side, weight in (("base", base), ("tuned", tuned)):
        if weight.same_as:
            notes.append(f"in the {side} model it is the same tensor as {weight.same_as}")
    _subtract(pairs, base.name, tuned, base, "; ".join(notes))
