"""`Change`: rows of ΔW in the precision and the order of operations in which a merge computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import LowRank
from spectra.deltas.products import HadamardProduct, KroneckerProduct, Product
from spectra.deltas.recipe import Recipe
from spectra.deltas.recipes import Difference, Factors, OnBase, Term
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.dump import OnSameBase
from spectra.sources.formats.dora import Dora

if TYPE_CHECKING:
    from torch import Tensor

# Roundings of an entry of ΔW formed in float32, where the arithmetic is not followed; PEFT's merges of all formats
# keep to a third of it.
_STEPS, _STEPS_FROM_BASE = 64, 512
_ALL = slice(None)


class Change:
    """ΔW of one weight. s·B·A is multiplied out for the rows that are asked for; other updates are kept as a whole.

    Args:
        updates: the updates that act on the weight; their sum is ΔW.
        base: W₀ (out, in) as it is stored.

    Raises:
        SourceError: the adapter's file holds the weight that it was trained on, and that is not W₀.

    Example:
        >>> import torch
        >>> delta = WeightDelta.from_tensor("a.weight", torch.tensor([[0.5], [0.25]]))
        >>> Change([delta], torch.zeros(2, 1)).float32(slice(1, 2)).tolist()
        [[0.25]]
    """

    def __init__(self, updates: Sequence[WeightDelta], base: Tensor) -> None:
        self.updates = updates
        self.base = base
        self._recipes = [_checked(delta.recipe) for delta in updates]
        self._kept: dict[Any, Any] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.base.shape[0], self.base.shape[1])

    @property
    def recipe(self) -> Recipe | None:
        """How ΔW is formed, where one update is all of it."""
        return self._recipes[0] if len(self._recipes) == 1 else None

    @property
    def term(self) -> Term | None:
        """s·B·A, where that is all of ΔW."""
        return _only_term(self.recipe)

    @property
    def replaces(self) -> bool:
        """Whether the adapter holds the new weight itself, so that nothing is added up."""
        return isinstance(self.recipe, Difference)

    @cached_property
    def multiplies(self) -> bool:
        """Whether ΔW is made of W₀, so that rounding errors are relative to W₀ rather than to ΔW."""
        return any(_place(ref) in self._base_places for ref in self._refs)

    @cached_property
    def halves(self) -> set[torch.dtype]:
        """The 16-bit types in which the adapter is stored."""
        types = {"BF16": torch.bfloat16, "F16": torch.float16}
        own = [ref for ref in self._refs if _place(ref) not in self._base_places]
        return {types[ref.dtype] for ref in own if ref.dtype in types}

    @property
    def steps(self) -> float:
        """How many roundings an entry of ΔW has that is formed in float32: one per product and sum of them."""
        if self.term is not None:
            return self.term.width + 2
        return _STEPS_FROM_BASE if self.multiplies else _STEPS

    def float32(self, rows: slice = _ALL) -> Tensor:
        """ΔW as a merge in float32 computes it: (B·A)·s and the like; else rounded from float64."""
        return self._in(torch.float32, rows)

    def double(self, rows: slice = _ALL) -> Tensor:
        """ΔW in float64, in a merge's order of operations where that is known."""
        return self._in(torch.float64, rows)

    def sharpest(self, kept: torch.dtype, rows: slice = _ALL) -> Tensor:
        """ΔW as exactly as a sum that is kept in a type can tell: float32 for 16 bits, else float64."""
        return self.float32(rows) if kept.itemsize == 2 else self.double(rows)

    def scaled_first(self, rows: slice = _ALL) -> Tensor:
        """(s·B)·A in float32, of a ΔW that is s·B·A."""
        left, right, s = self.factors(torch.float32)
        return (left[rows] * s) @ right

    def stepwise(self, dtype: torch.dtype, rows: slice = _ALL) -> Tensor:
        """s·B·A with the factors, their product and its multiple each rounded to a 16-bit type."""
        left, right, s = self.factors(torch.float32)
        product = left[rows].to(dtype).float() @ right.to(dtype).float()
        return product.to(dtype) * s

    def on(self, dtype: torch.dtype, rows: slice = _ALL) -> Tensor:
        """ΔW in float32 where the base was cast to a type first: another one if ΔW is made of W₀."""
        recipe = self.recipe
        if not isinstance(recipe, OnBase) or self.base.dtype == dtype:
            return self.float32(rows)
        cast = self._keep(("on", dtype), lambda: recipe.from_base(self.base.to(dtype).double()).to_dense().float())
        return cast[rows]

    def direction(self, rows: slice = _ALL) -> Tensor:
        """s·B·A inside of a DoRA, in float32."""
        inner = self.recipe.update if isinstance(self.recipe, Dora) else None
        term = _only_term(inner)
        if term is not None:
            left, right, s = self._keep("direction", lambda: factors(term, torch.float32))
            return (left[rows] @ right).mul_(s)
        assert inner is not None
        return self._keep("direction", lambda: inner.read().to_dense().float())[rows]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """B (out, r), A (r, in) and s of a ΔW that is s·B·A."""
        term = self.term
        assert term is not None
        return self._keep(("factors", dtype), lambda: factors(term, dtype))

    def magnitudes(self, rows: slice = _ALL, least: float = 0.0) -> Tensor:
        """What the rounding errors of an entry of ΔW are relative to, float32.

        Σ|l||r| for a product of factors; |ΔW| and its root mean square where the factors are not at hand, and
        |W₀| with that of its row where ΔW is made of W₀; 0 where the adapter holds the new weight itself.

        Args:
            rows: which rows.
            least: the least number of the type that factors are formed in without losing digits: below it their
                errors are relative to it.
        """
        if self.replaces:
            return torch.zeros_like(self.base[rows], dtype=torch.float32)
        sides = self._keep("sizes of factors", self._sizes_of_factors)
        if sides is not None:
            return (sides[0][rows] + least) @ (sides[1] + least)
        sizes = self.float32(rows).abs() + self._keep("typical", lambda: self.float32().square().mean().sqrt())
        if self.multiplies:
            base = self.base[rows].float()
            sizes += base.abs() + base.square().mean(1, keepdim=True).sqrt()
        return sizes

    def _sizes_of_factors(self) -> tuple[Tensor, Tensor] | None:
        if self.multiplies or self.recipe is None:
            return None
        form = self.recipe.read()
        return (form.left.float().abs(), form.right.float().abs()) if isinstance(form, LowRank) else None

    def _in(self, dtype: torch.dtype, rows: slice) -> Tensor:
        if self.term is not None:
            left, right, s = self.factors(dtype)
            return (left[rows] @ right).mul_(s)
        return self._keep(dtype, lambda: self._whole(dtype))[rows]

    def _whole(self, dtype: torch.dtype) -> Tensor:
        recipe = self.recipe
        if isinstance(recipe, HadamardProduct | KroneckerProduct) and not any(p.core for p in _products(recipe)):
            if isinstance(recipe, HadamardProduct):
                return _product(recipe.first, dtype).mul_(_product(recipe.second, dtype)).mul_(recipe.scale)
            return torch.kron(_side(recipe.first, dtype), _side(recipe.second, dtype)).mul_(recipe.scale)
        exact = self._keep("exact", lambda: sum(recipe.read().to_dense() for recipe in self._recipes if recipe))
        return exact.to(dtype)

    def _keep(self, key: object, form: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = form()
        return self._kept[key]

    @cached_property
    def _refs(self) -> list[TensorRef]:
        return [ref for recipe in self._recipes if recipe for ref in recipe.refs]

    @cached_property
    def _base_places(self) -> set[tuple[str, str]]:
        return {_place(delta.base.stored) for delta in self.updates if delta.base is not None}


def factors(term: Term, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """B (out, r), A (r, in) and s in a precision, vectors beside them multiplied in where PEFT does."""
    left = term.lefts[0].read_real().to(dtype)
    for ref in term.lefts[1:]:
        left = left + ref.read_real().to(dtype)
    if term.row_scale is not None:
        left = term.row_scale.read_real().to(dtype).reshape(-1, 1) * left
    right = term.right.read_real().to(dtype)
    if term.inner_scale is not None:
        right = term.inner_scale.read_real().to(dtype).reshape(-1, 1) * right
    return left, right, term.scale


def _checked(recipe: Recipe | None) -> Recipe | None:
    """The update itself, once the weight that its file holds beside it has been compared with the base's."""
    if not isinstance(recipe, OnSameBase):
        return recipe
    recipe.read()
    return recipe.update


def _place(ref: TensorRef) -> tuple[str, str]:
    return ref.path, ref.name


def _only_term(recipe: Recipe | None) -> Term | None:
    """s·B·A, where a recipe is nothing else."""
    if not isinstance(recipe, Factors) or len(recipe.terms) > 1 or recipe.terms[0].core is not None:
        return None
    return recipe.terms[0]


def _products(recipe: HadamardProduct | KroneckerProduct) -> list[Product]:
    return [side for side in (recipe.first, recipe.second) if isinstance(side, Product)]


def _product(product: Product, dtype: torch.dtype) -> Tensor:
    return product.left.read_real().to(dtype) @ product.right.read_real().to(dtype)


def _side(side: TensorRef | Product, dtype: torch.dtype) -> Tensor:
    return _product(side, dtype) if isinstance(side, Product) else side.read_real().to(dtype)
