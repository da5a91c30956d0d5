"""Which weight of the base a module of an adapter stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectra.deltas.base import BaseWeight
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import architectures, renames
from spectra.models.architectures import Cut
from spectra.models.matrices import as_matrix
from spectra.models.pairing import align, unwrap
from spectra.naming import role_of, split_parts
from spectra.sources.ledger import Ledger


@dataclass(frozen=True)
class Target:
    """The weight that a module changes.

    Attributes:
        name: its name in the base, or the module's own where no base is given.
        ref: W₀ (out, in), Linear orientation; None without a base, or where it cannot be read.
        stored: the tensor in the base's file that `ref` is a view of.
    """

    name: str
    ref: TensorRef | None = None
    stored: TensorRef | None = None

    @classmethod
    def of(cls, name: str, stored: TensorRef, config: Mapping[str, Any]) -> Target:
        """A stored tensor as a matrix in Linear orientation, under the config of the model it belongs to."""
        return cls(name, as_matrix(architectures.oriented(config, name, stored)), stored)

    @property
    def real(self) -> TensorRef | None:
        """W₀ where it is made of real numbers."""
        return self.ref if self.ref is not None and self.ref.is_float else None

    def base(self, cut: Cut | None = None) -> BaseWeight | None:
        """W₀, or the part of it that a cut takes, as an update knows it."""
        if self.real is None or self.stored is None:
            return None
        return BaseWeight(split_parts(self.name)[0], cut(self.real) if cut else self.real, self.stored)


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
    held = {name: Target.of(name, ref, base.config_of(name)) for name, ref in base.tensors.items()}
    names = align_file(ledger, shapes, {name: target.ref.shape for name, target in held.items() if target.ref})
    found: dict[str, Target] = {}
    for own, shape in shapes.items():
        name = names[own]
        if name not in held and name not in base.unusable:
            embedding = tied_to(base, name)
            if embedding is None:
                ledger.tuned_only[own] = "not in the base"
                continue
            held[name] = Target(name, held[embedding].ref, held[embedding].stored)
        if name in base.unusable and shape is None:
            ledger.refuse(name, (), "unreadable", base.unusable[name])
        elif name in base.unusable:
            ledger.warnings.append(f"{name}: the norm of the base weight is unknown: {base.unusable[name]}")
            found[own] = Target(name)
        else:
            _enter(ledger, found, own, shape, held[name])
    return found


def _enter(ledger: Ledger, found: dict[str, Target], own: str, shape: tuple[int, int] | None, target: Target) -> None:
    there = target.ref.shape if target.ref else ()
    if shape is not None and there != shape:
        why = f"the update is {list(shape)}, the base weight {list(there)}"
        ledger.refuse(target.name, shape, "shape_mismatch", why)
    else:
        found[own] = target


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
    """The weight's name in the model, for a tensor that an adapter saves whole.

    >>> saved_name("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", unwrap(stored))


def tied_to(base: Folder, name: str) -> str | None:
    """The embedding whose weight an output head shares: a base that does not hold the one has it in the other."""
    if role_of(name) != "lm_head" or base.config.get("tie_word_embeddings") is False:
        return None
    embeddings = [other for other in base.tensors if role_of(other) == "embed_tokens"]
    return embeddings[0] if len(embeddings) == 1 else None
