"""`Change`: ΔW of one weight as its entries, in the precision in which a merge computes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from spectra.deltas.delta import Recipe, WeightDelta
from spectra.deltas.forms import LowRank
from spectra.deltas.products import HadamardProduct, KroneckerProduct, Product
from spectra.deltas.recipes import Difference, Factors, OnBase, Term
from spectra.files.tensors import TensorRef
from spectra.sources.formats.dora import Dora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of updates whose arithmetic is not followed; PEFT's merges in float32 of all formats keep to a third of it.
_STEPS, _STEPS_FROM_BASE = 64, 512


class Change:
    """ΔW of one weight, formed when an order of operations asks for it and kept while the weight is at work.

    Args:
        updates: the updates that act on the weight; their sum is ΔW.
        base: W₀ (out, in) as it is stored.
    """

    def __init__(self, updates: Sequence[WeightDelta], base: Tensor) -> None:
        self.updates = updates
        self.base = base
        self._kept: dict[object, Tensor] = {}

    @property
    def recipe(self) -> Recipe | None:
        """How ΔW is formed, where one update is all of it."""
        return self.updates[0].recipe if len(self.updates) == 1 else None

    @property
    def term(self) -> Term | None:
        """s·B·A, where that is all of ΔW."""
        return _only_term(self.recipe)

    @property
    def replaces(self) -> bool:
        """Whether the adapter holds the new weight itself, so that nothing is added up."""
        return isinstance(self.recipe, Difference)

    @property
    def multiplies(self) -> bool:
        """Whether ΔW is made of W₀, so that rounding errors are relative to W₀ rather than to ΔW."""
        return any(self._place(ref) in self._base_places for ref in self._refs)

    @property
    def halves(self) -> set[torch.dtype]:
        """The 16-bit types in which the adapter is stored."""
        import torch

        types = {"BF16": torch.bfloat16, "F16": torch.float16}
        own = [ref for ref in self._refs if self._place(ref) not in self._base_places]
        return {types[ref.dtype] for ref in own if ref.dtype in types}

    @cached_property
    def _refs(self) -> list[TensorRef]:
        return [ref for delta in self.updates if delta.recipe for ref in delta.recipe.refs]

    @cached_property
    def _base_places(self) -> set[tuple[str, str]]:
        return {self._place(delta.base.stored) for delta in self.updates if delta.base is not None}

    @staticmethod
    def _place(ref: TensorRef) -> tuple[str, str]:
        return ref.path, ref.name

    @cached_property
    def direct(self) -> bool:
        """Whether a merge's own arithmetic is known, so that ΔW can be formed in float32 as it would be."""
        recipe = self.recipe
        if isinstance(recipe, HadamardProduct | KroneckerProduct):
            return not any(product.core for product in _products(recipe))
        return self.term is not None

    def float64(self) -> Tensor:
        """ΔW in float64, exact up to its own rounding."""
        return self._keep("float64", self._float64)

    def double(self) -> Tensor:
        """ΔW in float64 in the order of operations of a merge, where that is known."""
        import torch

        return self._keep("double", lambda: self.computed(torch.float64)) if self.direct else self.float64()

    def float32(self) -> Tensor:
        """ΔW as a merge in float32 computes it: (B·A)·s and the like; else rounded from float64."""
        import torch

        return self._keep("float32", lambda: self.computed(torch.float32) if self.direct else self.float64().float())

    def sharpest(self, kept: torch.dtype) -> Tensor:
        """ΔW as exactly as a sum that is kept in a type can tell: float32 for 16 bits, else float64."""
        return self.float32() if kept.itemsize == 2 else self.double()

    @property
    def steps(self) -> float:
        """How many roundings an entry of ΔW has that is formed in float32: one per product and sum of them."""
        if self.term is not None:
            return self.term.width + 2
        return _STEPS_FROM_BASE if self.multiplies else _STEPS

    def direction(self) -> Tensor:
        """s·B·A inside of a DoRA in float32."""
        import torch

        assert isinstance(self.recipe, Dora)
        term = _only_term(self.recipe.update)
        if term is None:
            return self._keep("direction", lambda: self.recipe.update.read().to_dense().float())
        return self._keep("direction", lambda: _times(term, torch.float32))

    def scaled_first(self) -> Tensor:
        """(s·B)·A in float32; as `float32` where there is no s·B·A."""
        import torch

        if self.term is None:
            return self.float32()
        left, right, s = factors(self.term, torch.float32)
        return self._keep("scaled first", lambda: (left * s) @ right)

    def stepwise(self, dtype: torch.dtype) -> Tensor:
        """s·B·A with the factors, their product and its multiple each rounded to a 16-bit type."""
        import torch

        if self.term is None:
            return self.float32().to(dtype)

        def steps(term: Term) -> Tensor:
            left, right, s = factors(term, torch.float32)
            product = (left.to(dtype).float() @ right.to(dtype).float()).to(dtype)
            return product * s

        term = self.term
        return self._keep(dtype, lambda: steps(term))

    def on(self, dtype: torch.dtype) -> Tensor:
        """ΔW in float32 where the base was cast to a type first: another one if ΔW is made of W₀."""
        recipe = self.recipe
        if not isinstance(recipe, OnBase) or self.base.dtype == dtype:
            return self.float32()
        return self._keep(("on", dtype), lambda: recipe.from_base(self.base.to(dtype).double()).to_dense().float())

    def computed(self, dtype: torch.dtype) -> Tensor:
        """ΔW with every product in a precision, as PEFT orders them; only where `direct`."""
        import torch

        recipe = self.recipe
        if isinstance(recipe, HadamardProduct):
            return _product(recipe.first, dtype).mul_(_product(recipe.second, dtype)).mul_(recipe.scale)
        if isinstance(recipe, KroneckerProduct):
            return torch.kron(_side(recipe.first, dtype), _side(recipe.second, dtype)).mul_(recipe.scale)
        assert self.term is not None
        return _times(self.term, dtype)

    def magnitudes(self) -> Tensor:
        """What the rounding errors of an entry of ΔW are relative to, float32 (out, in).

        Σ|l||r| for a product of factors; |ΔW| and its root mean square where the factors are not at hand, and
        |W₀| with that of its row where ΔW is made of W₀; 0 where the adapter holds the new weight itself.
        """
        return self._keep("magnitudes", self._magnitudes)

    def _magnitudes(self) -> Tensor:
        import torch

        if self.replaces:
            return torch.zeros(self.base.shape, dtype=torch.float32)
        if not self.multiplies and len(self.updates) == 1:
            form = self.updates[0].read()
            if isinstance(form, LowRank):
                return form.left.float().abs() @ form.right.float().abs()
        size = self.float32().abs()
        size += size.square().mean().sqrt()
        if self.multiplies:
            base = self.base.float()
            size += base.abs() + base.square().mean(1, keepdim=True).sqrt()
        return size

    def _float64(self) -> Tensor:
        first, *others = (delta.read().to_dense() for delta in self.updates)
        for other in others:
            first = first + other
        return first

    def _keep(self, key: object, form: object) -> Tensor:
        if key not in self._kept:
            self._kept[key] = form()  # type: ignore[operator]
        return self._kept[key]


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


def _only_term(recipe: Recipe | None) -> Term | None:
    """s·B·A, where a recipe is nothing else."""
    plain = isinstance(recipe, Factors) and len(recipe.terms) == 1 and recipe.terms[0].core is None
    return recipe.terms[0] if plain and isinstance(recipe, Factors) else None


def _times(term: Term, dtype: torch.dtype) -> Tensor:
    left, right, s = factors(term, dtype)
    return (left @ right).mul_(s)


def _products(recipe: HadamardProduct | KroneckerProduct) -> list[Product]:
    return [side for side in (recipe.first, recipe.second) if isinstance(side, Product)]


def _product(product: Product, dtype: torch.dtype) -> Tensor:
    return product.left.read_real().to(dtype) @ product.right.read_real().to(dtype)


def _side(side: TensorRef | Product, dtype: torch.dtype) -> Tensor:
    return _product(side, dtype) if isinstance(side, Product) else side.read_real().to(dtype)
