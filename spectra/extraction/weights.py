"""From updates to what a LoRA can hold: whole weights as the base stores them, summed over several sources."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectra.deltas.base import BaseWeight
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Form, LowRank
from spectra.deltas.recipe import Recipe, form_of
from spectra.deltas.recipes import Factors, Placed
from spectra.deltas.rounding import together
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of a weight.

    Attributes:
        total: how many it has.
        view: what a cut makes of a column of their numbers.
    """

    total: int
    view: TensorRef

    @classmethod
    def of(cls, total: int, cut: Callable[[TensorRef], TensorRef]) -> Rows:
        """The rows that a cut takes."""
        return cls(total, cut(TensorRef("", "", "F64", (total, 1), "", (0, 0))))


Place = BaseWeight | Rows | None


@dataclass(frozen=True)
class Part:
    """Rows of a whole weight's update.

    Attributes:
        recipe: how to form them.
        place: which rows of the whole: where they lie in the base's tensor, or their numbers.
    """

    recipe: Recipe
    place: BaseWeight | Rows

    def rows(self) -> Tensor:
        """The numbers of the rows in the whole."""
        return row_numbers(self.place)


def row_numbers(place: BaseWeight | Rows) -> Tensor:
    """The rows of the stored weight, in Linear orientation, that a part of it is made of.

    Example:
        >>> stored = TensorRef("", "c_attn.weight", "F32", (2, 6), "safetensors", (0, 0), stored=(2, 6))
        >>> row_numbers(BaseWeight("c_attn.weight", stored.T.rows(2, 4), stored)).tolist()
        [2, 3]
    """
    if isinstance(place, Rows):
        return place.view.view(torch.arange(place.total).reshape(-1, 1)).flatten()
    entries = place.places()[:, 0]
    width = place.stored.shape[-1] if place.transposed else math.prod(place.stored.shape[1:])
    return entries % width if place.transposed else entries // width


@dataclass(frozen=True)
class Joined:
    """ΔW of a whole weight from the updates of its parts; rows that no part has are zero.

    Attributes:
        parts: the parts.
        shape: (out, in) of the whole.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, int]

    @property
    def factored(self) -> bool:
        """Whether every part is a pair of factors."""
        return all(form_of(part.recipe) is LowRank for part in self.parts)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of the parts."""
        return tuple(dict.fromkeys(ref for part in self.parts for ref in part.recipe.refs))

    @property
    def shared(self) -> bool:
        """Whether the parts are rows of one product, which was cut for them: they have the right factor in common."""
        return self.factored and len({_right_of(part.recipe) for part in self.parts}) == 1

    @property
    def reading_bytes(self) -> int:
        """The whole, a part, and what reading that takes."""
        entries = self.shape[0] * self.shape[1]
        return 0 if self.factored else 16 * entries + _most_reading(part.recipe for part in self.parts)

    def read(self, device: str = "cpu") -> Form:
        """Put the parts in their rows."""
        forms = [part.recipe.read(device) for part in self.parts]
        rows = [part.rows().to(device) for part in self.parts]
        if self.factored:
            return join_factors(self.shape, forms, rows, shared=self.shared)
        whole = forms[0].tensors[0].new_zeros(self.shape)
        for form, places in zip(forms, rows, strict=True):
            whole[places] = form.to_dense()
        return Dense(whole, noise_edge=_edge(forms), noise=together([form.noise for form in forms]))


def join_factors(shape: tuple[int, int], forms: Sequence[Form], rows: Sequence[Tensor], *, shared: bool) -> LowRank:
    """One pair of factors for a weight whose rows have a pair each.

    Args:
        shape: (out, in).
        forms: a pair of factors each.
        rows: which rows are whose.
        shared: whether the right factors are one and the same, so that the pair is no wider than each.
    """
    factors = [form for form in forms if isinstance(form, LowRank)]
    widths = [form.left.shape[1] for form in factors]
    left = factors[0].left.new_zeros((shape[0], widths[0] if shared else sum(widths)))
    start = 0
    for form, places, width in zip(factors, rows, widths, strict=True):
        left[places, start : start + width] = form.left
        start += 0 if shared else width
    right = factors[0].right if shared else torch.cat([form.right for form in factors])
    return LowRank(left, right)


def _right_of(recipe: Recipe) -> object:
    """What the right factor of a part is made of: the same for parts that were cut from one product."""
    if isinstance(recipe, Factors):
        return tuple(replace(term, lefts=(term.right,), row_scale=None) for term in recipe.terms)
    return recipe.whole if isinstance(recipe, Placed) else recipe


def _rank_of(recipe: Recipe) -> int:
    """What the rank of the product that a part was cut from cannot exceed."""
    if isinstance(recipe, Factors):
        return sum(term.width for term in recipe.terms)
    whole: int = getattr(getattr(recipe, "whole", recipe), "rank", sys.maxsize)
    return whole


@dataclass(frozen=True)
class WeightedSum:
    """Σ w·ΔW of updates of one weight, in factors where all of them are.

    Attributes:
        terms: (w, the update) each.
        shape: (out, in).
    """

    terms: tuple[tuple[float, Recipe], ...]
    shape: tuple[int, int]

    @property
    def factored(self) -> bool:
        """Whether every update is a pair of factors."""
        return all(form_of(recipe) is LowRank for _, recipe in self.terms)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of the updates."""
        return tuple(dict.fromkeys(ref for _, recipe in self.terms for ref in recipe.refs))

    @property
    def reading_bytes(self) -> int:
        """The sum, an update, and what reading that takes."""
        entries = self.shape[0] * self.shape[1]
        return 0 if self.factored else 16 * entries + _most_reading(recipe for _, recipe in self.terms)

    def read(self, device: str = "cpu") -> Form:
        """Add the updates up, one at a time where they are dense."""
        if self.factored:
            forms = [recipe.read(device).scaled(weight) for weight, recipe in self.terms]
            pairs = [form for form in forms if isinstance(form, LowRank)]
            return LowRank(torch.cat([pair.left for pair in pairs], 1), torch.cat([pair.right for pair in pairs]))
        whole = torch.zeros(self.shape, dtype=torch.float64, device=device)
        edges: list[Form] = []
        for weight, recipe in self.terms:
            form = recipe.read(device).scaled(weight)
            whole += form.to_dense()
            edges.append(replace(form, matrix=whole[:0]) if isinstance(form, Dense) else form)
        return Dense(whole, noise_edge=_edge(edges), noise=together([form.noise for form in edges]))


def _edge(forms: Sequence[Form]) -> float | None:
    """An upper bound of what rounding leaves in a sum or stack of matrices: √Σ edge², where any edge is known."""
    known = [form.noise_edge for form in forms if form.noise_edge is not None]
    return math.hypot(*known) if known else None


def _most_reading(recipes: Iterable[Recipe]) -> int:
    return max(int(getattr(recipe, "reading_bytes", 0)) for recipe in recipes)


def whole(name: str, shape: tuple[int, int], deltas: Sequence[WeightDelta], places: Sequence[Place]) -> WeightDelta:
    """The update of a whole weight, from that of it or those of its parts.

    W₀ is left out of it: its norm, for which the engine would read it, is not needed.

    Args:
        name: the weight's name.
        shape: (out, in).
        deltas: what there is of it.
        places: where each of them lies in it; None for a delta that is all of it.
    """
    if len(deltas) == 1 and deltas[0].shape == shape:
        return replace(deltas[0], name=name, base=None)
    parts = tuple(
        Part(delta.recipe, place) for delta, place in zip(deltas, places, strict=True) if delta.recipe and place
    )
    joined = Joined(parts, shape)
    width = sum(delta.max_rank for delta in deltas)
    return _made(name, joined, min(width, _rank_of(parts[0].recipe)) if joined.shared else width)


def weighted(name: str, updates: Sequence[tuple[float, WeightDelta]]) -> WeightDelta:
    """Σ w·ΔW of one weight."""
    weight, first = updates[0]
    if len(updates) == 1 and weight == 1:
        return first
    terms = tuple((weight, delta.recipe) for weight, delta in updates if delta.recipe)
    shape = (first.shape[0], first.shape[1])
    return _made(name, WeightedSum(terms, shape), sum(delta.max_rank for _, delta in updates))


def _made(name: str, recipe: Joined | WeightedSum, width: int) -> WeightDelta:
    shape = recipe.shape
    return WeightDelta(name, shape, recipe, min(width, *shape) if recipe.factored else min(shape))
