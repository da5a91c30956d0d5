"""How the updates of an adapter are entered: module by module, in the parts that the base has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from spectra.deltas.recipes import Factors, Placed, Term, Update
from spectra.files.tensors import TensorRef
from spectra.models import architectures
from spectra.sources.ledger import Ledger, Refusal, Slots, slot_pattern
from spectra.sources.targets import Target, targets

__all__ = [
    "Refusal",
    "Slots",
    "Target",
    "add_factored",
    "add_modules",
    "add_modules_on_base",
    "add_update",
    "row_numbers",
    "slot_pattern",
]


def add_modules(
    ledger: Ledger, modules: Mapping[str, Slots], build: Callable[[str, Slots], Update], *, note: str = ""
) -> None:
    """Enter the updates of modules whose tensors say everything.

    Args:
        ledger: the account.
        modules: module → its tensors.
        build: makes the update of one module, or raises a `Refusal`.
        note: what to say of all of them.
    """
    updates: dict[str, Update] = {}
    for module, slots in modules.items():
        with ledger.attempt(f"{module}.weight"):
            updates[module] = build(module, slots)
    for module, target in targets(ledger, {module: update.shape for module, update in updates.items()}).items():
        add_update(ledger, target, updates[module], note=note)


def add_modules_on_base(
    ledger: Ledger, modules: Mapping[str, Slots], build: Callable[[str, Slots, TensorRef], Update], *, note: str = ""
) -> None:
    """The same for updates that take the base's weight, or its shape, to form: `build` gets its reference, too."""
    for module, target in targets(ledger, dict.fromkeys(modules)).items():
        if target.ref is None:
            continue
        with ledger.attempt(target.name, target.ref.shape):
            if len(target.ref.shape) != 2 or not target.ref.numel or not target.ref.is_float:
                kind = f"{list(target.ref.shape)} of {target.ref.dtype}"
                raise Refusal(f"the base weight is {kind}, not a real matrix")
            add_update(ledger, target, build(module, modules[module], target.ref), note=note)


def add_factored(ledger: Ledger, target: Target, terms: Sequence[Term], *, note: str = "", whole: bool = False) -> None:
    """Enter Σ terms as the update of one weight, in its parts where the base says that it is fused, unless `whole`."""
    shape = Factors(tuple(terms)).shape
    for part, cut in _cuts(ledger, target, shape[0], whole).items():
        cut_terms = tuple(
            replace(
                term,
                lefts=tuple(cut(left) for left in term.lefts),
                row_scale=cut(term.row_scale) if term.row_scale and term.row_scale.numel > 1 else term.row_scale,
            )
            for term in terms
        )
        piece = Factors(cut_terms)
        ledger.add(_named(target, part), piece.shape, piece, piece.rank, note, target.base(cut))


def add_update(ledger: Ledger, target: Target, update: Update, *, note: str = "", whole: bool = False) -> None:
    """Enter any update of one weight, in its parts where the base says that it is fused, unless `whole`."""
    for part, cut in _cuts(ledger, target, update.shape[0], whole).items():
        rows = cut(row_numbers(update.shape[0]))
        recipe = Placed(update, rows) if part else update
        shape = (rows.shape[0], update.shape[1])
        ledger.add(_named(target, part), shape, recipe, update.rank, note, target.base(cut))


def _cuts(ledger: Ledger, target: Target, rows: int, whole: bool) -> dict[str, architectures.Cut]:
    """How to cut what is fused; one cut named "" that leaves everything where nothing is."""
    config = ledger.base.config_of(target.name) if ledger.base else {}
    cuts = architectures.parts(config, target.name, rows) if ledger.split and not whole else {}
    return cuts or {"": _all_of_it}


def _all_of_it(ref: TensorRef) -> TensorRef:
    return ref


def _named(target: Target, part: str) -> str:
    return f"{target.name}[{part}]" if part else target.name


def row_numbers(rows: int) -> TensorRef:
    """A column that is never read: what a cut does to it says which rows a part has."""
    return TensorRef("", "", "F64", (rows, 1), "", (0, 0))
