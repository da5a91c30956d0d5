"""What every adapter format shares: keys to modules, and modules to the base's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spectra.deltas.recipes import Factors, Placed, Term, Update
from spectra.errors import BaseRequiredError, SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import architectures, renames
from spectra.models.matrices import as_matrix
from spectra.models.pairing import align, unwrap
from spectra.naming import role_of
from spectra.sources.difference import subtract
from spectra.sources.ledger import Ledger

Slots = dict[str, TensorRef]


def by_module(tensors: Iterable[str], pattern: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Group stored names by the module they adapt.

    Args:
        tensors: stored names.
        pattern: what comes after `<module>.`, a regular expression for the whole rest; the group
            `slot` names the tensor's part, an optional group `adapter` the adapter's name.

    Returns:
        module → slot → stored name, and the names that do not fit the pattern.

    Raises:
        SourceError: the file holds several adapters under different names.
    """
    compiled = re.compile(rf"(?P<module>.+?)\.(?:{pattern})")
    groups: dict[str, dict[str, str]] = {}
    rest, adapters = [], set()
    for name in tensors:
        found = compiled.fullmatch(unwrap(name))
        if not found:
            rest.append(name)
            continue
        adapters.add(found.groupdict().get("adapter"))
        groups.setdefault(found["module"], {})[found["slot"]] = name
    if len(adapters) > 1:
        named = ", ".join(sorted(str(adapter) for adapter in adapters))
        raise SourceError(f"the file holds several adapters ({named}); save the one you mean on its own")
    return groups, rest


def slot_pattern(names: str) -> str:
    """`by_module`'s pattern for parameters of these names (regular expressions joined by |).

    What a trainer may add to a parameter's name is allowed for: the adapter's name and `.weight`.
    """
    return rf"(?P<slot>{names})(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?"


def modules_of(ledger: Ledger, pattern: str) -> tuple[dict[str, Slots], list[str]]:
    """module → slot → reference for the modules of a tuned file, and the names that belong to none.

    A module with a tensor that cannot be read is refused, and so is any other unreadable tensor.
    """
    tuned = ledger.tuned
    groups, rest = by_module(tuned.tensors, pattern)
    broken, lost = by_module(tuned.broken, pattern)
    for module, slots in broken.items():
        groups.pop(module, None)
        ledger.refuse(f"{module}.weight", (), "unreadable", tuned.broken[next(iter(slots.values()))])
    for name in lost:
        ledger.refuse(name, (), "unreadable", tuned.broken[name])
    refs = {m: {slot: tuned.tensors[name] for slot, name in slots.items()} for m, slots in groups.items()}
    return refs, rest


def shared_tensor(ledger: Ledger, rest: Iterable[str], name: str) -> tuple[TensorRef | None, list[str]]:
    """The tensor that all modules of an adapter share, `base_model.<name>`, and the names that are left without it.

    Copies that a trainer stored under modules as well are listed as such.

    Raises:
        SourceError: it is there and cannot be read.
    """
    pattern = re.compile(rf"(?:(?P<module>.+)\.)?{name}(?:\.[^.]+)?")
    tuned, found, left = ledger.tuned, None, []
    for key in [*rest, *tuned.broken]:
        match = pattern.fullmatch(key)
        if match is None:
            left += [] if key in tuned.broken else [key]
        elif match["module"] not in (None, "base_model"):
            ledger.skipped[unwrap(key)] = f"a copy of the {name} that all modules share"
        elif key in tuned.broken:
            raise SourceError(f"{key} is shared by all modules and cannot be read: {tuned.broken[key]}")
        else:
            found = tuned.tensors[key]
    return found, left


@dataclass(frozen=True)
class Target:
    """The base's weight that a module stands for: its name, and its reference where a base is given."""

    name: str
    ref: TensorRef | None = None


def targets(ledger: Ledger, shapes: Mapping[str, tuple[int, int] | None]) -> dict[str, Target]:
    """module → the weight it adapts, for modules with an update of the given (out, in) shapes.

    A shape of None is one that the file does not say: the base's is taken as it is.

    Without a base the name is the module's own. With one, names are aligned as for checkpoints; a
    module that the base lacks goes to `tuned_only`, one of another shape is refused.
    """
    found = weight_targets(ledger, {f"{module}.weight": shape for module, shape in shapes.items()})
    return {name.removesuffix(".weight"): target for name, target in found.items()}


def weight_targets(ledger: Ledger, shapes: Mapping[str, tuple[int, int] | None]) -> dict[str, Target]:
    """The same for weights by their full names, which need not end in `.weight`."""
    if ledger.base is None or not shapes:
        return {name: Target(name) for name in shapes}
    base = ledger.base
    oriented = {
        name: as_matrix(architectures.oriented(base.config_of(name), name, ref)) for name, ref in base.tensors.items()
    }
    names = align_file(ledger, shapes, {name: ref.shape for name, ref in oriented.items()})
    found: dict[str, Target] = {}
    for own, shape in shapes.items():
        name = names[own]
        if name not in oriented and name not in base.unusable:
            tied = _tied_to(base, oriented, name)
            if tied is None:
                ledger.tuned_only[own] = "not in the base"
                continue
            oriented[name] = oriented[tied]
        if name in base.unusable and shape is None:
            ledger.refuse(name, (), "unreadable", base.unusable[name])
        elif name in base.unusable:
            ledger.warnings.append(f"{name}: the norm of the base weight is unknown: {base.unusable[name]}")
            found[own] = Target(name)
        elif shape is not None and oriented[name].shape != shape:
            why = f"the update is {list(shape)}, the base weight {list(oriented[name].shape)}"
            ledger.refuse(name, shape, "shape_mismatch", why)
        else:
            found[own] = Target(name, oriented[name])
    return found


def align_file(
    ledger: Ledger, shapes: Mapping[str, tuple[int, ...] | None], base_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The base's names for the weights that an adapter changes, by one rule that all tensors of its file follow."""
    assert ledger.base is not None
    base = ledger.base
    saved = {saved_name(name): ref.shape for name, ref in ledger.tuned.tensors.items()}
    ledger.base_evidence.update(shapes)
    wanted = {**saved, **ledger.base_evidence}
    held = {**base_shapes, **dict.fromkeys(base.unusable, ())}
    newest = {renames.current(base.config_of(name), name): name for name in held}
    current = {name: renames.current(base.config, name) for name in wanted}
    if len(newest) < len(held) or len(set(current.values())) < len(current):
        newest, current = {name: name for name in held}, {name: name for name in wanted}
    names, rule = align(
        {current[name]: shape for name, shape in wanted.items()}, {name: held[old] for name, old in newest.items()}
    )
    if rule and rule not in ledger.warnings:
        ledger.warnings.append(rule)
    ledger.base_names.update({name: newest.get(names[new], names[new]) for name, new in current.items()})
    return ledger.base_names


def saved_name(stored: str) -> str:
    """The weight's name in the model, for a tensor that an adapter saves whole."""
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", unwrap(stored))


def _tied_to(base: Folder, oriented: Mapping[str, TensorRef], name: str) -> str | None:
    """The embedding whose weight an output layer shares: a base that does not hold the one has it in the other."""
    if role_of(name) != "lm_head" or base.config.get("tie_word_embeddings") is False:
        return None
    embeddings = [other for other in oriented if role_of(other) == "embed_tokens"]
    return embeddings[0] if len(embeddings) == 1 else None


def add_factored(ledger: Ledger, target: Target, terms: Sequence[Term], *, split: bool, note: str = "") -> None:
    """Enter Σ terms as the update of one weight, in its parts where the base says that it is fused."""
    config = ledger.base.config_of(target.name) if ledger.base else {}
    whole = Factors(tuple(terms), target.ref if target.ref and target.ref.is_float else None)
    cuts = architectures.parts(config, target.name, whole.shape[0]) if split else {}
    for part, cut in cuts.items():
        cut_terms = tuple(
            replace(
                term,
                lefts=tuple(cut(left) for left in term.lefts),
                row_scale=cut(term.row_scale) if term.row_scale and term.row_scale.numel > 1 else term.row_scale,
            )
            for term in terms
        )
        piece = Factors(cut_terms, cut(whole.base) if whole.base else None)
        ledger.add(f"{target.name}[{part}]", piece.shape, piece, piece.rank, note)
    if not cuts:
        ledger.add(target.name, whole.shape, whole, whole.rank, note)


def add_update(ledger: Ledger, target: Target, update: Update, *, split: bool, note: str = "") -> None:
    """Enter any update of one weight, in its parts where the base says that it is fused."""
    config = ledger.base.config_of(target.name) if ledger.base else {}
    base = target.ref if target.ref and target.ref.is_float else None
    cuts = architectures.parts(config, target.name, update.shape[0]) if split else {}
    for part, cut in cuts.items():
        rows = cut(_shadow((update.shape[0], 1)))
        placed = Placed(update, rows, cut(base) if base else None)
        ledger.add(f"{target.name}[{part}]", (rows.shape[0], update.shape[1]), placed, update.rank, note)
    if not cuts:
        recipe = update if base is None or base in update.refs else Placed(update, None, base)
        ledger.add(target.name, update.shape, recipe, update.rank, note)


def _shadow(shape: tuple[int, ...]) -> TensorRef:
    return TensorRef("", "", "F64", shape, "", (0, 0))


def add_modules(
    ledger: Ledger,
    modules: Mapping[str, Slots],
    build: Callable[[str, Slots], Update | str],
    *,
    split: bool,
    note: str = "",
) -> None:
    """Enter the updates of modules whose tensors say everything; `build` gives one, or the reason there is none."""
    updates: dict[str, Update] = {}
    for module, slots in modules.items():
        update = build(module, slots)
        if isinstance(update, str):
            ledger.refuse(f"{module}.weight", (), "unsupported", update)
        else:
            updates[module] = update
    for module, target in targets(ledger, {module: update.shape for module, update in updates.items()}).items():
        add_update(ledger, target, updates[module], split=split, note=note)


def add_modules_on_base(
    ledger: Ledger,
    modules: Mapping[str, Slots],
    build: Callable[[str, Slots, TensorRef], Update | str],
    *,
    split: bool,
    note: str = "",
) -> None:
    """The same for updates that take the base's weight, or its shape, to form: `build` gets its reference, too."""
    for module, target in targets(ledger, dict.fromkeys(modules)).items():
        if target.ref is None:
            continue
        if len(target.ref.shape) != 2 or not target.ref.numel or not target.ref.is_float:
            kind = f"{list(target.ref.shape)} of {target.ref.dtype}"
            ledger.refuse(target.name, target.ref.shape, "unsupported", f"the base weight is {kind}, not a real matrix")
            continue
        update = build(module, modules[module], target.ref)
        if isinstance(update, str):
            ledger.refuse(target.name, target.ref.shape, "unsupported", update)
        else:
            add_update(ledger, target, update, split=split, note=note)


def add_rest(ledger: Ledger, rest: Iterable[str], *, split: bool) -> None:
    """What lies beside the adapter's own tensors: biases, which are no matrices, and weights that are saved whole."""
    names = list(rest)
    biases = [name for name in names if name.endswith(".bias")]
    ledger.skipped.update(dict.fromkeys(map(unwrap, biases), "a bias, not a matrix"))
    add_saved_weights(ledger, [name for name in names if name not in biases], split=split)


def add_saved_weights(ledger: Ledger, stored: Iterable[str], *, split: bool) -> None:
    """Tensors that an adapter saves whole (`modules_to_save`): new values, so ΔW = saved − base."""
    for key in stored:
        ref = ledger.tuned.tensors[key]
        clean = saved_name(key)
        if len(ref.shape) < 2:
            ledger.skipped[clean] = "a vector, not a matrix"
        elif ".base_layer." in clean:
            ledger.skipped[clean] = "an unchanged copy of the base weight"
        elif ledger.base is None:
            ledger.skipped[clean] = "saved whole, so ΔW needs the base weight: pass --base"
        else:
            base = ledger.base
            shapes = {key: item.shape for key, item in base.tensors.items()}
            name = (ledger.base_names or align_file(ledger, {}, shapes))[clean]
            held = name if name in base.tensors else _tied_to(base, base.tensors, name)
            if held is None:
                ledger.tuned_only[clean] = "saved whole, and not in the base"
                continue
            config = base.config_of(held)
            saved, original = (
                as_matrix(architectures.oriented(config, held, item)) for item in (ref, base.tensors[held])
            )
            subtract(ledger, name, saved, original, config, split)


def unusable(slots: Slots, needed: Iterable[str]) -> str:
    """Why the tensors of a module cannot be used: one is missing, or is not made of real numbers; "" if they can."""
    for slot in needed:
        if slot not in slots:
            there = next(iter(slots.values()))
            return f"{slot} is missing in {there.path}"
        if not slots[slot].is_float:
            return f"{slot} is stored as {slots[slot].dtype}, not as real numbers"
    return ""


def config_of(tuned: Folder, what: str) -> Mapping[str, Any]:
    """The adapter's config.

    Raises:
        SourceError: there is none.
    """
    if tuned.adapter_config is None:
        raise SourceError(
            f"{tuned.path} has no adapter_config.json beside it, and {what} cannot be read without: put it back"
        )
    return tuned.adapter_config


def real(config: Mapping[str, Any], key: str, where: object) -> float:
    """A finite number of the config.

    Raises:
        SourceError: it is missing or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SourceError(f"{where}: {key} = {value!r} is not a finite number; mend adapter_config.json")
    return float(value)


def count(config: Mapping[str, Any], key: str, where: object) -> int:
    """A positive whole number of the config.

    Raises:
        SourceError: it is missing or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise SourceError(f"{where}: {key} = {value!r} is not a positive whole number; mend adapter_config.json")
    return value


def flag(config: Mapping[str, Any], key: str, where: object) -> bool:
    """A yes or no of the config.

    Raises:
        SourceError: it is missing or something else.
    """
    value = config.get(key)
    if not isinstance(value, bool):
        raise SourceError(f"{where}: {key} = {value!r} is neither true nor false; mend adapter_config.json")
    return value


def refuse_options(ledger: Ledger, heads: str | int, scale: float | None) -> None:
    """Say that `heads=` and `scale=` mean nothing for an adapter with one head whose scale is known."""
    refuse_heads(ledger, heads)
    if scale is not None:
        ledger.warnings.append("scale was ignored: the adapter's files say all there is to scale")


def refuse_heads(ledger: Ledger, heads: str | int) -> None:
    """Say that `heads=` means nothing for an adapter with one head."""
    if heads != "mean":
        ledger.warnings.append(f"heads={heads!r} was ignored: the adapter has one head")


def need_base(ledger: Ledger, what: str, because: str = "depends on the base weights") -> Folder:
    """The base, or an error that says that the format needs one.

    Raises:
        BaseRequiredError: there is none.
    """
    if ledger.base is None:
        raise BaseRequiredError(f"{ledger.tuned.path}: ΔW of {what} {because}: pass --base")
    return ledger.base
