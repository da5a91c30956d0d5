"""Which weight of the base a module of an adapter stands for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from spectra.deltas.base import BaseWeight
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import architectures, renames, tied
from spectra.models.architectures import Cut
from spectra.models.matrices import as_matrix
from spectra.models.pairing import align, unwrap
from spectra.naming import split_parts
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
    module that the base lacks, or has in another shape, has no number. Several modules whose weights are one
    have one target.
    """
    weights = weight_targets(ledger, {f"{module}.weight": shape for module, shape in shapes.items()})
    return {name.removesuffix(".weight"): target for name, target in weights.items()}


def weight_targets(ledger: Ledger, shapes: Mapping[str, tuple[int, int] | None]) -> dict[str, Target]:
    """The same for weights by their full names, which need not end in `.weight`."""
    if ledger.base is None or not shapes:
        return {name: _inside(ledger, name, shape) for name, shape in shapes.items()}
    base = ledger.base
    held = {name: Target.of(name, ref, base.config_of(name)) for name, ref in base.tensors.items()}
    names = align_file(ledger, shapes, {name: target.ref.shape for name, target in held.items() if target.ref})
    by_weight: dict[str, Target] = {}
    for own, shape in shapes.items():
        name = names[own]
        other = shared_weight(ledger, name)
        if other is not None:
            ledger.tied.setdefault(other, []).append(own)
            name = other
        if name not in held and name not in base.unusable:
            untied = tied.stored_as(name, held.keys(), {}, base.config_of(name))
            if untied is None:
                ledger.lack(own, "not in the base", shape or ())
                continue
            held[name] = Target(name, held[untied].ref, held[untied].stored)
        if name in base.unusable and shape is None:
            ledger.refuse(name, (), "unreadable", base.unusable[name])
        elif name in base.unusable:
            ledger.warnings.append(f"{name}: the norm of the base weight is unknown: {base.unusable[name]}")
            by_weight[own] = Target(name)
        else:
            _enter(ledger, by_weight, own, shape, held[name])
    return by_weight


def _inside(ledger: Ledger, name: str, shape: tuple[int, int] | None) -> Target:
    """A weight where no base is given: W₀ is what the file itself holds of it, if anything."""
    stored = ledger.inner.tensors.get(name) if ledger.inner else None
    if ledger.inner is None or stored is None:
        return Target(name)
    target = Target.of(name, stored, ledger.inner.config)
    return target if target.ref is not None and shape in (None, target.ref.shape) else Target(name)


def _enter(
    ledger: Ledger, by_weight: dict[str, Target], own: str, shape: tuple[int, int] | None, target: Target
) -> None:
    there = target.ref.shape if target.ref else ()
    if shape is not None and there != shape:
        why = f"the update is {list(shape)}, the base weight {list(there)}"
        ledger.refuse(target.name, shape, "shape_mismatch", why)
    else:
        by_weight[own] = target


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
    if ledger.base_evidence and all(_is_tied(base, name, held) for name in ledger.base_evidence):
        ledger.base_names.update(
            {name: name for name in wanted}
        )  # no name of the file is in the base, and none has to be
        return ledger.base_names
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


def _is_tied(base: Folder, name: str, held: Collection[str]) -> bool:
    """Whether a weight is a head that the base does not hold, since it is the embedding."""
    return name not in held and tied.stored_as(name, held, base.same, base.config_of(name)) is not None


def saved_name(stored: str) -> str:
    """The weight's name in the model, for a tensor that an adapter saves whole.

    >>> saved_name("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    return re.sub(r"\.modules_to_save\.[^.]+\.|\.base_layer\.", ".", unwrap(stored))


def shared_weight(ledger: Ledger, name: str) -> str | None:
    """The stored weight that a weight of the base is where it has another name, unless the adapter unties the two."""
    assert ledger.base is not None
    base = ledger.base
    stored = tied.stored_as(name, base.tensors.keys(), base.same, base.config_of(name))
    return None if stored is None or saves_whole(ledger, name) or saves_whole(ledger, stored) else stored


def saves_whole(ledger: Ledger, name: str) -> bool:
    """Whether the config names the weight's module, or one around it, in `modules_to_save`.

    Raises:
        SourceError: that is no list.
    """
    named = ledger.config.get("modules_to_save") or []
    if not isinstance(named, str | list):
        raise SourceError(f"{ledger.where}: modules_to_save = {named!r} is no list of names; mend adapter_config.json")
    listed = [named] if isinstance(named, str) else [str(item) for item in named]
    module = name.removesuffix(".weight")
    return any(module == item or module.endswith(f".{item}") or f".{item}." in f".{name}" for item in listed)
