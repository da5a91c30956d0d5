"""Products for some rows of a fused weight, where a trainer adapts q, k and v on their own and the base fuses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from spectra.deltas.recipes import Factors, Term
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.models import architectures
from spectra.models.architectures import Cut
from spectra.sources.adapter import row_numbers
from spectra.sources.ledger import Ledger, Refusal
from spectra.sources.targets import Target

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The product of one part.

    Attributes:
        term: s·B·A with the rows of the part.
        cut: takes the part out of the whole weight; None where the rows of the whole are not known.
    """

    term: Term
    cut: Cut | None


@dataclass(frozen=True)
class Spread:
    """A part's rows in their places in the whole weight, zeros in all other rows.

    Attributes:
        part: the rows that are stored.
        places: where they belong, as the part of a column of the whole's row numbers.
        count: the rows of the whole.
    """

    linear: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    part: TensorRef
    places: TensorRef
    count: int

    @property
    def reading_bytes(self) -> int:
        """The part and the whole."""
        return self.part.nbytes * (1 + self.count // max(1, self.part.shape[0]))

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The part."""
        return (self.part,)

    def read(self) -> Tensor:
        """The rows in their places."""
        part = self.part.read()
        whole = part.new_zeros((self.count, *part.shape[1:]))
        whole[self.places.view(torch.arange(self.count)[:, None]).flatten()] = part
        return whole

    def rows(self, start: int, stop: int) -> None:
        """Not read alone."""

    def item(self, index: int) -> None:
        """Not read alone."""


def add_parts(ledger: Ledger, target: Target, parts: Mapping[str, Part], count: int | None) -> None:
    """Enter the products of parts of one weight, each on its own where two models' weights are compared so.

    Elsewhere, and where fused weights are kept whole, their sum is one update with zeros in the rows of no part.

    Args:
        ledger: the account.
        target: the fused weight.
        parts: part's name → product.
        count: the rows of the whole; None where they are not known.
    """
    if count is None or _apart(ledger, target.name, count):
        for name, part in parts.items():
            with ledger.attempt(f"{target.name}[{name}]", part.term.shape):
                update = Factors((_checked(part, target),))
                base = target.base(part.cut) if part.cut else None
                ledger.add(f"{target.name}[{name}]", update.shape, update, update.rank, base=base)
        return
    shape = (count, next(iter(parts.values())).term.shape[1])
    with ledger.attempt(target.name, shape):
        terms = [_spread(_checked(part, target), part.cut, count) for part in parts.values()]
        update = Factors(tuple(terms))
        ledger.add(target.name, update.shape, update, update.rank, base=target.base())


def _apart(ledger: Ledger, name: str, count: int) -> bool:
    """Whether a fused weight is reported in its parts."""
    if not ledger.split or ledger.base is None:
        return ledger.split
    return bool(architectures.parts(ledger.base.config_of(name), name, count))


def _checked(part: Part, target: Target) -> Term:
    """The part's product, if it fits the base."""
    there = part.cut(target.ref).shape if part.cut and target.ref is not None else part.term.shape
    if there != part.term.shape:
        raise Refusal(f"the update is {list(part.term.shape)}, the base weight {list(there)}", "shape_mismatch")
    return part.term


def _spread(term: Term, cut: Cut | None, count: int) -> Term:
    """The product with zeros in the rows of other parts."""
    assert cut is not None
    left, shape = term.lefts[0], (count, *term.lefts[0].shape[1:])
    codec = Spread(left, cut(row_numbers(count)), count)
    place = (left.path, left.name, left.dtype, shape, left.container, left.stamp, left.storage)
    return replace(term, lefts=(TensorRef(*place, stored=shape, codec=codec),))
