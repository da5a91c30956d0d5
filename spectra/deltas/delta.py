"""`WeightDelta`: one update ΔW as a recipe that nobody has read yet.

Nothing here imports torch: listing a model touches no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING

from spectra import naming, text
from spectra.deltas import at_work
from spectra.deltas.base import BaseWeight
from spectra.deltas.forms import Form
from spectra.deltas.recipe import Recipe, form_of
from spectra.errors import SelectionError
from spectra.files.tensors import TensorRef
from spectra.printing import printed
from spectra.spectrum import Status

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WeightDelta:
    """One update ΔW as a recipe: nothing is read until `read`.

    Attributes:
        name: the weight's name in the base checkpoint; a part of a fused tensor adds `[part]`.
        shape: (out, in), Linear orientation whatever the storage.
        recipe: how to form it; None if `status` already says that it cannot be done.
        max_rank: min(out, in), or less where the factors say so.
        status: "ok" until read, or why there is nothing to read.
        reason: one sentence that goes with the status.
        note: what the number stands for where that is not simply tuned − base.
        base: where W₀ is, in the update's orientation and cut as the update is; None where no base was given.

    Example:
        >>> import torch
        >>> delta = WeightDelta.from_tensor("a.weight", torch.diag(torch.tensor([3.0, 4.0])))
        >>> delta.shape, delta.max_rank, float(delta.read().to_dense().norm())
        ((2, 2), 2, 5.0)
    """

    name: str
    shape: tuple[int, ...]
    recipe: Recipe | None
    max_rank: int
    status: Status = "ok"
    reason: str = ""
    note: str = ""
    base: BaseWeight | None = None

    @property
    def role(self) -> str:
        """The weight's role, such as "v_proj"."""
        return naming.role_of(self.name)

    @property
    def layer(self) -> int | None:
        """The index of its layer, or None."""
        return naming.layer_of(self.name)

    @cached_property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor that `read` opens, the base's weight included."""
        of_recipe = self.recipe.refs if self.recipe is not None else ()
        base = self.base.ref if self.base is not None and self.recipe is not None else None
        return of_recipe if base is None or base in of_recipe else (*of_recipe, base)

    @property
    def factored(self) -> bool:
        """Whether `read` gives factors."""
        return self.recipe is not None and self.recipe.factored

    @property
    def form(self) -> type[Form] | None:
        """The class of what `read` gives, known beforehand: the plan goes by it. None if there is nothing to read."""
        return form_of(self.recipe) if self.recipe is not None else None

    def read(self, device: str = "cpu") -> Form:
        """Form ΔW in float64 on the device; the only place where tensor data is touched.

        Raises:
            SelectionError: the delta has no recipe; its status and reason say why.
            SourceError: a file is gone, changed or broken.
        """
        if self.recipe is None:
            raise SelectionError(f"{self.name} cannot be read: {self.status}: {self.reason}")
        with at_work.in_hands("reading", self.name, self.shape):
            form = self.recipe.read(device)
            if self.base is not None and form.base_norm is None:
                form = form.beside(self.base.read(device))
            return form

    @classmethod
    def from_tensor(cls, name: str, matrix: Tensor) -> WeightDelta:
        """A delta from a matrix in memory (out, in), for notebooks and tests."""
        from spectra.deltas.recipes import InMemory

        return cls._from_form(name, InMemory.of(matrix))

    @classmethod
    def from_factors(cls, name: str, left: Tensor, right: Tensor) -> WeightDelta:
        """A delta left · right from factors in memory (out, r) and (r, in)."""
        from spectra.deltas.recipes import InMemory

        return cls._from_form(name, InMemory.of(left, right))

    @classmethod
    def _from_form(cls, name: str, recipe: Recipe) -> WeightDelta:
        form = recipe.read()
        return cls(name, form.shape, recipe, form.max_rank)

    @classmethod
    def refused(cls, name: str, shape: Sequence[int], status: Status, reason: str) -> WeightDelta:
        """A matrix that the user asked for and that cannot be done: it keeps its row in every result."""
        return cls(name, tuple(shape), None, 0, status, reason)

    def __repr__(self) -> str:
        if self.recipe is None:
            return f"WeightDelta({printed(self.name)}, {printed(text.with_reason(self.status, self.reason))})"
        return (
            f"WeightDelta({printed(self.name)}, {text.size(self.shape)}, rank ≤ {self.max_rank}, {_made_of(self)}"
            f"{', ' + printed(self.note) if self.note else ''})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "role": self.role,
            "layer": "–" if self.layer is None else self.layer,
            "shape": text.size(self.shape),
            "rank ≤": self.max_rank if self.recipe else "–",
            "form": _made_of(self),
            "status": text.with_reason(self.status, self.reason),
            "note": self.note,
        }
        rows = [
            (ref.name, ref.dtype, text.size(ref.shape), "/".join(PurePath(ref.path).parts[-2:])) for ref in self.refs
        ]
        return text.page(f"WeightDelta: {self.name}", facts, ("stored tensor", "dtype", "shape", "file"), rows)


def _made_of(delta: WeightDelta) -> str:
    """The form that `read` gives, and the recipe's name; "not readable" without one.

    >>> import torch
    >>> _made_of(WeightDelta.from_tensor("a.weight", torch.eye(2)))
    'dense, InMemory'
    """
    if delta.recipe is None:
        return "not readable"
    return f"{'factored' if delta.factored else 'dense'}, {type(delta.recipe).__name__}"
