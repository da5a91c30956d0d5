"""What every adapter format shares: keys to modules, and modules to the base's weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from spectra.errors import BaseRequiredError, SourceError
from spectra.sources import architectures
from spectra.sources.checkpoint import as_matrix, subtract
from spectra.sources.folder import Folder
from spectra.sources.ledger import Ledger
from spectra.sources.pairing import align, unwrap
from spectra.sources.recipes import Factors, Term
from spectra.sources.tensors import TensorRef

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


@dataclass(frozen=True)
class Target:
    """The base's weight that a module stands for: its name, and its reference where a base is given."""

    name: str
    ref: TensorRef | None = None


def targets(ledger: Ledger, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
    """module → the weight it adapts, for modules with an update of the given (out, in) shapes.

    Without a base the name is the module's own. With one, names are aligned as for checkpoints; a
    module that the base lacks goes to `tuned_only`, one of another shape is refused.
    """
    if ledger.base is None:
        return {module: Target(f"{module}.weight") for module in shapes}
    base = ledger.base
    oriented = {name: as_matrix(architectures.oriented(base.config, name, ref)) for name, ref in base.tensors.items()}
    names, rule = align(
        {f"{module}.weight": shape for module, shape in shapes.items()},
        {name: ref.shape for name, ref in oriented.items()} | dict.fromkeys(base.broken, ()),
    )
    if rule:
        ledger.warnings.append(rule)
    found: dict[str, Target] = {}
    for module, shape in shapes.items():
        name = names[f"{module}.weight"]
        if name in base.broken:
            ledger.warnings.append(f"{name}: the norm of the base weight is unknown: {base.broken[name]}")
            found[module] = Target(name)
        elif name not in oriented:
            ledger.tuned_only[f"{module}.weight"] = "not in the base"
        elif oriented[name].shape != shape:
            why = f"the update is {list(shape)}, the base weight {list(oriented[name].shape)}"
            ledger.refuse(name, shape, "shape_mismatch", why)
        else:
            found[module] = Target(name, oriented[name])
    return found


def add_factored(ledger: Ledger, target: Target, terms: Sequence[Term], *, split: bool, note: str = "") -> None:
    """Enter Σ terms as the update of one weight, in its parts where the base says that it is fused."""
    config = ledger.base.config if ledger.base else {}
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


def add_saved_weights(ledger: Ledger, stored: Iterable[str], *, split: bool) -> None:
    """Tensors that an adapter saves whole (`modules_to_save`): new values, so ΔW = saved − base."""
    for name in stored:
        ref = ledger.tuned.tensors[name]
        clean = re.sub(r"\.modules_to_save\.[^.]+\.", ".", unwrap(name))
        if len(ref.shape) < 2:
            ledger.skipped[clean] = "a vector, not a matrix"
        elif ".base_layer." in clean:
            ledger.skipped[clean] = "an unchanged copy of the base weight"
        elif ledger.base is None:
            ledger.skipped[clean] = "saved whole, so ΔW needs the base weight: pass --base"
        else:
            base = ledger.base
            names, _ = align({clean: ref.shape}, {key: value.shape for key, value in base.tensors.items()})
            if names[clean] not in base.tensors:
                ledger.tuned_only[clean] = "saved whole, and not in the base"
                continue
            saved, original = (
                as_matrix(architectures.oriented(base.config, names[clean], item))
                for item in (ref, base.tensors[names[clean]])
            )
            subtract(ledger, names[clean], saved, original, base.config, split)


def refuse_heads(ledger: Ledger, heads: str | int) -> None:
    """Say that `heads=` means nothing for an adapter with one head."""
    if heads != "mean":
        ledger.warnings.append(f"heads={heads!r} was ignored: the adapter has one head")


def need_base(ledger: Ledger, what: str) -> Folder:
    """The base, or an error that says that the format needs one.

    Raises:
        BaseRequiredError: there is none.
    """
    if ledger.base is None:
        raise BaseRequiredError(f"{ledger.tuned.path}: ΔW of {what} depends on the base weights: pass --base")
    return ledger.base
