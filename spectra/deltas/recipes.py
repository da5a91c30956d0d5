"""Recipes: how to form one ΔW from stored tensors, in float64. Frozen, picklable, unread."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

from spectra.deltas.forms import Dense, Form, LowRank
from spectra.deltas.lengths import frobenius
from spectra.deltas.recipe import Recipe
from spectra.files.far import is_at_hand
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.deltas.rounding import Noise

_SMALL = 2**16  # entries of a base that is kept until its update is solved
_ROUNDED_ENTRIES = 2**16  # at once: they stay in the cache
_BLOCK_ENTRIES = 2**20  # of a block in which weights are subtracted: 8 MiB in float64, however wide a row is


class FromTensors:
    """What recipes share that are dataclasses of stored tensors: their `refs` are those of the fields, in order."""

    @property
    def factored(self) -> bool:
        """False; a class whose ΔW always is a product of factors says `factored = True`."""
        return False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor among the fields, in tuples and in recipes that are fields; each once."""
        nested = (ref for item in fields(self) for ref in _refs(getattr(self, item.name)))  # type: ignore[arg-type]
        return tuple(dict.fromkeys(nested))


def _refs(value: object) -> Iterator[TensorRef]:
    if isinstance(value, TensorRef):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _refs(item)
    elif not isinstance(value, type):
        yield from getattr(value, "refs", ())


@dataclass(frozen=True, eq=False)
class InMemory:
    """A matrix, or two factors, that is already here."""

    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, *factors: Tensor) -> InMemory:
        """From one matrix (out, in), or left (out, r) and right (r, in)."""
        tensors = tuple(torch.as_tensor(factor) for factor in factors)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"a weight delta needs matrices, not shapes {shapes}")
        if len(shapes) == 2 and shapes[0][1] != shapes[1][0]:
            raise ValueError(f"factors of shapes {shapes[0]} and {shapes[1]} cannot be multiplied")
        return cls(tensors)

    @property
    def factored(self) -> bool:
        """True for two factors."""
        return len(self.factors) == 2

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Nothing is stored."""
        return ()

    def read(self, device: str = "cpu") -> Form:
        """The matrix or the factors in float64."""
        # One after the other: in one step torch converts on the CPU and moves float64.
        tensors = [factor.detach().to(device).to(torch.float64) for factor in self.factors]
        return LowRank(tensors[0], tensors[1]) if self.factored else Dense(tensors[0])


@dataclass(frozen=True)
class Difference(FromTensors):
    """ΔW = tuned − base, subtracted in float64, in which it is exact."""

    tuned: TensorRef
    base: TensorRef

    @property
    def reading_bytes(self) -> int:
        """ΔW, and a block of the base in float64 with its squares."""
        return 8 * (self.tuned.numel + 3 * min(self.tuned.numel, _BLOCK_ENTRIES))

    def read(self, device: str = "cpu") -> Dense:
        """Subtract, and note what the stored weights tell about the difference."""
        return differences([self], [self.tuned.read_real(device)], [self.base.read_real(device)])[0]

    def rounded(self, noise: Noise, update: Tensor, *, base: Tensor | None = None) -> Tensor:
        """What would be left of an update of this base, had it been stored as the noise tells; written over it.

        Args:
            noise: how it was stored.
            update: the update.
            base: the base, as stored; None to read it.
        """
        base = self.base.read_real(str(update.device)) if base is None else base
        height = max(1, _ROUNDED_ENTRIES // max(1, update.shape[1]))
        for start in range(0, update.shape[0], height):
            rows = update[start : start + height]
            rows.copy_(noise.rounded(base[start : start + height].to(torch.float64), rows))
        return update


def differences(recipes: Sequence[Difference], tuned: Sequence[Tensor], base: Sequence[Tensor]) -> list[Dense]:
    """What each recipe reads, from its two weights; for those of one shape and one storage type on either side.

    Several small ones are one computation: each call of torch or numpy takes as long as a small matrix itself. None of
    them has any influence on the numbers of another.

    Args:
        recipes: which weights these are.
        tuned: the tuned weights, as stored.
        base: the base's, as stored.
    """
    from spectra.deltas.rounding import CODES, rounding_noises

    after, before = (stack[0][None] if len(stack) == 1 else torch.stack(list(stack)) for stack in (tuned, base))
    delta = after.to(torch.float64, copy=True)
    count, rows, columns = delta.shape
    squares, inner, moved = torch.zeros(3, count, dtype=torch.float64, device=delta.device)
    height = max(1, _BLOCK_ENTRIES // max(1, columns))
    for start in range(0, rows, height):  # never both weights in float64: half of the memory
        block, left = before[:, start : start + height].to(torch.float64, copy=True), delta[:, start : start + height]
        squares += block.square().sum((1, 2))
        moved += _nonzero(left.sub_(block))
        inner += block.mul_(left).sum((1, 2))
    # What codes stand for has the codes' precision only before it is scaled: no grid is known of it.
    first = recipes[0]
    stored_as, base_stored_as = (CODES if ref.codec else ref.dtype for ref in (first.tuned, first.base))
    noises = rounding_noises(after, stored_as, before, base_stored_as, delta)
    counts = torch.stack([squares, inner, moved], 1).tolist()
    return [_difference(*one) for one in zip(recipes, delta, base, noises, counts, strict=True)]


def _nonzero(stack: Tensor) -> Tensor:
    """How many entries of each matrix are not zero."""
    return stack.count_nonzero()[None] if len(stack) == 1 else (stack != 0).sum((1, 2))


def _difference(
    recipe: Difference, delta: Tensor, base: Tensor, noise: tuple[Noise, ...], sums: tuple[float, float, float]
) -> Dense:
    """One of them, with ‖W₀‖², ⟨W₀, ΔW⟩ and how many entries moved."""
    squares, inner, moved = sums
    # A server is asked once, and what is small is not worth reading again.
    small = base.numel() <= _SMALL and base.device.type == "cpu"
    kept = small or not is_at_hand(recipe.base)
    return Dense(
        matrix=delta,
        base_norm=frobenius(base, squares),
        base_inner=inner,
        noise_edge=noise[0].edge if noise and noise[0].known else None,
        noise=noise,
        rounded=partial(recipe.rounded, base=base if kept else None),
        unchanged=(delta.numel() - int(moved)) / delta.numel() if delta.numel() else None,
    )


@dataclass(frozen=True)
class Term(FromTensors):
    """scale · diag(row_scale) · (Σ lefts) · diag(inner_scale) · core · right, one summand of an update.

    Attributes:
        lefts: (out, r) each; several where heads that share `right` are added up.
        right: (r, in).
        scale: a number, α/r and the like.
        row_scale: (out,) or a single entry, or None.
        inner_scale: (r,), or None.
        core: (r, r') between the factors, or (r, r', kh, kw) where a convolution is CP-decomposed; right is (r', in).
    """

    lefts: tuple[TensorRef, ...]
    right: TensorRef
    scale: float = 1.0
    row_scale: TensorRef | None = None
    inner_scale: TensorRef | None = None
    core: TensorRef | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        kernel = math.prod(self.core.shape[2:]) if self.core else 1
        return (self.lefts[0].shape[0], self.right.shape[1] * kernel)

    @property
    def width(self) -> int:
        """What the rank of the summand cannot exceed."""
        return self.lefts[0].shape[1]

    def read(self, device: str) -> tuple[Tensor, Tensor]:
        """The two factors in float64, all scales in the left one."""
        left, right = _blank(self.shape, self.width, device)
        self.write(left, right)
        return left, right

    def write(self, left: Tensor, right: Tensor) -> None:
        """Read the two factors into their places, all scales in the left one."""
        device = str(left.device)
        left.copy_(self.lefts[0].read_real(device))
        for ref in self.lefts[1:]:
            left += ref.read_float64(device)
        if self.row_scale is not None:
            left *= self.row_scale.read_float64(device).reshape(-1, 1)
        if self.inner_scale is not None:
            left *= self.inner_scale.read_float64(device).reshape(1, -1)
        if self.scale != 1:
            left *= self.scale
        if self.core is None:
            right.copy_(self.right.read_real(device))
            return
        core = self.core.read_float64(device)
        product = torch.einsum("pq...,qj->pj...", core, self.right.read_float64(device))
        right.copy_(product.reshape(right.shape))


def _blank(shape: tuple[int, int], width: int, device: str) -> tuple[Tensor, Tensor]:
    """Places for the two factors of a ΔW of a shape."""
    left = torch.empty((shape[0], width), dtype=torch.float64, device=device)
    return left, torch.empty((width, shape[1]), dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Factors(FromTensors):
    """ΔW = Σ terms, as one pair of factors [L₁ | … | L_n] · [R₁; …; R_n]."""

    factored = True
    terms: tuple[Term, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.terms[0].shape

    @property
    def rank(self) -> int:
        """The sum of the factor widths, at most min(out, in)."""
        return min(sum(term.width for term in self.terms), *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The factors in float64."""
        left, right = _blank(self.shape, sum(term.width for term in self.terms), device)
        start = 0
        for term in self.terms:
            columns = slice(start, start + term.width)
            term.write(left[:, columns], right[columns])
            start += term.width
        return LowRank(left, right)


@dataclass(frozen=True)
class Summed(FromTensors):
    """ΔW = Σ parts, for several updates of one weight, none of which depends on the weight.

    Attributes:
        parts: recipes of equal shape.
    """

    parts: tuple[Recipe, ...]

    @property
    def factored(self) -> bool:
        """Whether all parts are."""
        return all(part.factored for part in self.parts)

    @property
    def reading_bytes(self) -> int:
        """The largest of what the parts need."""
        return max(getattr(part, "reading_bytes", 0) for part in self.parts)

    def read(self, device: str = "cpu") -> Form:
        """The factors side by side, or the matrices added up, in float64."""
        forms = [part.read(device) for part in self.parts]
        if all(isinstance(form, LowRank) for form in forms):
            lefts, rights = zip(*((form.left, form.right) for form in forms if isinstance(form, LowRank)), strict=True)
            return LowRank(torch.cat(lefts, 1), torch.cat(rights, 0))
        return Dense(torch.stack([form.to_dense() for form in forms]).sum(0))


def svd_bytes(m: int, n: int) -> int:
    """What a matrix (m, n) in float64 takes with LAPACK's copy, all its singular vectors and the work space."""
    short = min(m, n)
    return 8 * (2 * m * n + short * (m + n) + 4 * short**2)


class Update(Recipe, Protocol):
    """A recipe that knows the size of its ΔW before it is read."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def rank(self) -> int:
        """What the rank of ΔW cannot exceed."""
        ...


@dataclass(frozen=True)
class OnBase(FromTensors):
    """What updates share that are formed from W₀: its shape, full rank, its norm, and what forming them takes.

    Attributes:
        base: W₀ (out, in).
        copies: how many matrices of W₀'s size there are in float64 at most while `read` is at work.
    """

    copies: ClassVar[int] = 3
    base: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.base.shape[0], self.base.shape[1])

    @property
    def rank(self) -> int:
        """What the rank of ΔW cannot exceed: min(out, in), unless the format says less."""
        return min(self.shape)

    @property
    def reading_bytes(self) -> int:
        """W₀ and everything of its size on the way to ΔW."""
        return 8 * self.copies * self.base.numel

    def read(self, device: str = "cpu") -> Form:
        """Read W₀ once, for ΔW and for what it says of it."""
        base = self.base.read_float64(device)
        return self.from_base(base).beside(base)

    def from_base(self, base: Tensor) -> Form:
        """ΔW from W₀ (out, in) in float64, on its device."""
        raise NotImplementedError


@dataclass(frozen=True)
class Placed:
    """Those rows of an update that one part of a fused weight has.

    Attributes:
        whole: the update of the whole weight.
        rows: which rows, as the view of a column of the whole's row numbers.
    """

    whole: Recipe
    rows: TensorRef

    @property
    def factored(self) -> bool:
        """As the whole update."""
        return self.whole.factored

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of the whole update."""
        return self.whole.refs

    @property
    def reading_bytes(self) -> int:
        """What reading the whole update takes."""
        needed: int = getattr(self.whole, "reading_bytes", 0)
        return needed

    def read(self, device: str = "cpu") -> Form:
        """Form the whole update and keep the part, without a norm: that of the whole base is not the part's.

        Rows of a Kronecker product are no such product, and are formed.
        """
        whole = self.whole.read(device)
        part = whole.take(self._row_numbers(whole))
        return LowRank(part.left, part.right) if isinstance(part, LowRank) else Dense(part.to_dense())

    def _row_numbers(self, whole: Form) -> Tensor:
        """The numbers of the part's rows among those of the whole."""
        return self.rows.view(torch.arange(whole.shape[0], device=whole.tensors[0].device).reshape(-1, 1)).flatten()
