"""Which solvers a form of ΔW has, the first choice first. The next one runs only if one fails, and that is recorded.

A solver takes several forms of one class whose tensors have equal shapes. One that gains from that (`joint`) stacks
them; one alone is never stacked, for on a CPU a single matrix has faster ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spectra.deltas.forms import SMALL, Dense, Form, Kronecker, LowRank
from spectra.engine.solvers import dense, factored, kronecker, topk

# S, U, Vh, and Σσ⁴ where the solver had it before it had S.
Numbers = tuple[Tensor, Tensor | None, Tensor | None] | tuple[Tensor, Tensor | None, Tensor | None, dense.Moment]


@dataclass(frozen=True)
class Rung:
    """What a solver is called and what it can tell apart.

    Attributes:
        name: what the result's `method` says.
        resolution: values at or below it, relative to σ₁, are not resolved.
        complete: whether S holds every value.
        grows: whether the resolution is to be taken times √min(m, n).
    """

    name: str
    resolution: float
    complete: bool = True
    grows: bool = False

    def resolution_of(self, shape: tuple[int, ...]) -> float:
        """The resolution for a matrix of this shape.

        Example:
            >>> Rung("by hand", 1e-8, grows=True).resolution_of((100, 400))
            1e-07
        """
        return self.resolution * math.sqrt(min(shape)) if self.grows else self.resolution


CHOLESKY_CORE = Rung("cholesky-qr2-core-svd-f64", dense.SVD_RESOLUTION)
QR_CORE = Rung("qr-core-svd-f64", dense.SVD_RESOLUTION)
KRONECKER = Rung("kronecker-svd-f64", dense.SVD_RESOLUTION)
PRODUCT = Rung("product-svd-f64", dense.SVD_RESOLUTION)
GRAM_VALUES = Rung("gram-eigvals-f64", dense.GRAM_RESOLUTION, grows=True)
GRAM_LANCZOS = Rung("gram-lanczos-f64", dense.GRAM_RESOLUTION, grows=True)
GRAM_CERTIFIED = Rung("gram-lanczos-certified-f64", dense.GRAM_RESOLUTION, complete=False, grows=True)
GRAM_EIGH = Rung("gram-eigh-f64", dense.GRAM_RESOLUTION, grows=True)
SVD = Rung("svd-f64", dense.SVD_RESOLUTION)


@dataclass(frozen=True)
class Solver:
    """One rung and how to climb it.

    Attributes:
        rung: what it is called.
        run: forms of equal shapes ↦ S, and U and Vh if vectors were asked for, of each.
        joint: whether several at once are faster than one after another.
    """

    rung: Rung
    run: Callable[[Sequence[Any]], Iterable[Numbers]]
    joint: bool = False


Ladder = list[Solver]


def ladder_for(form: Form, top: int, only_top: bool, *, together: bool = False) -> Ladder:
    """The ladder for a form, and for every other one whose tensors have its shapes.

    Args:
        form: ΔW.
        top: how many vectors; 0 for none.
        only_top: the other values are not needed.
        together: whether several are solved at once: the solvers that gain from it come first then.
    """
    ladder = LADDERS[type(form)](form, top, only_top)
    return sorted(ladder, key=lambda solver: not solver.joint) if together else ladder


def _dense_ladder(form: Dense, top: int, only_top: bool) -> Ladder:
    if not top:
        return [
            Solver(GRAM_VALUES, _noting(lambda A: (dense.gram_values(A), None, None)), joint=True),
            Solver(
                SVD, _each(lambda form: (dense.svd_values(form.matrix), None, None, dense.fourth_moment(form.matrix)))
            ),
        ]
    full = Solver(SVD, _each(lambda form: (*dense.svd_top(form.matrix, top), dense.fourth_moment(form.matrix))))
    if not topk.worthwhile(min(form.shape), top):
        return [Solver(GRAM_EIGH, _noting(lambda A: dense.gram_top(A, top, None)), joint=True), full]

    @lru_cache(maxsize=1)  # one Gram matrix for all rungs: forms climb one after another
    def gram(form: Dense) -> tuple[Tensor, dense.Moment]:
        with dense.noted_moments() as moments:
            product = dense.gram(form.matrix)
        return product, (moments[0][0] if moments else dense.fourth_moment(form.matrix))

    def eigh(forms: Sequence[Dense]) -> Iterable[Numbers]:
        if len(forms) > 1:
            return _noting(lambda A: dense.gram_top(A, top, None))(forms)
        product, moment = gram(forms[0])
        return [(*dense.gram_top(forms[0].matrix, top, product), moment)]

    def krylov(form: Dense) -> Numbers:
        product, moment = gram(form)
        return (*run(form.matrix, top, product), moment)

    first, run = (GRAM_CERTIFIED, dense.lanczos_only_top) if only_top else (GRAM_LANCZOS, dense.lanczos_top)
    return [Solver(first, _each(krylov)), Solver(GRAM_EIGH, eigh, joint=True), full]


def _low_rank_ladder(form: LowRank, top: int, only_top: bool) -> Ladder:
    def by_cholesky(forms: Sequence[LowRank]) -> Iterator[Numbers]:
        L, R, left, right = (_stacked(alike) for alike in zip(*(f.tensors + f.grams for f in forms), strict=True))
        return _apart(factored.factored_svd(L, R, top, (left, right)), len(forms))

    by_householder = Solver(QR_CORE, _at_once(lambda L, R: factored.factored_svd(L, R, top)), joint=True)
    rest = [by_householder, _product(top)]
    # Without at least as many rows as columns, L and Rᵀ cannot be of full rank.
    tall = form.left.shape[1] <= min(form.shape)
    return [Solver(CHOLESKY_CORE, by_cholesky, joint=True), *rest] if tall else rest


def _kronecker_ladder(form: Kronecker, top: int, only_top: bool) -> Ladder:
    sides = _each(lambda form: kronecker.kronecker_svd(form.first, form.second, top))
    return [Solver(KRONECKER, sides), _product(top)]  # two small SVDs each: several at once gain nothing


LADDERS: Mapping[type[Form], Callable[[Any, int, bool], Ladder]] = {
    Dense: _dense_ladder,
    LowRank: _low_rank_ladder,
    Kronecker: _kronecker_ladder,
}


def _product(top: int) -> Solver:
    """The last resort of a form that is no matrix of entries: the SVD of the product, as dear as a dense update's."""

    def run(form: Form) -> Numbers:
        S, U, Vh = dense.svd_top(form.to_dense(), max(top, 1))
        count = form.max_rank
        return S[:count], U[:, :count] if top else None, Vh[:count] if top else None

    return Solver(PRODUCT, _each(run))


def _each(solve: Callable[[Any], Numbers]) -> Callable[[Sequence[Any]], Iterator[Numbers]]:
    """A solver of several forms from that of one: one after another."""
    return lambda forms: (solve(form) for form in forms)


def _at_once(solve: Callable[..., Numbers]) -> Callable[[Sequence[Form]], Iterator[Numbers]]:
    """A solver of several forms from that of their tensors, which may be stacked."""

    def run(forms: Sequence[Form]) -> Iterator[Numbers]:
        alike = zip(*(form.tensors for form in forms), strict=True)
        return _apart(solve(*(_stacked(tensors) for tensors in alike)), len(forms))

    return run


def _noting(solve: Callable[[Tensor], Any]) -> Callable[[Sequence[Dense]], Iterator[Numbers]]:
    """A solver of several forms from that of their matrices, stacked; with Σσ⁴ from the Gram matrices that it forms."""

    def run(forms: Sequence[Dense]) -> Iterator[Numbers]:
        with dense.noted_moments() as noted:
            numbers = solve(_stack([form.matrix for form in forms]))
        moments = noted[0] if noted else [dense.fourth_moment(form.matrix) for form in forms]
        for (S, U, Vh, *_), moment in zip(_apart(numbers, len(forms)), moments, strict=True):
            yield S, U, Vh, moment

    return run


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    """As `_stacked`; small ones alone are stacked, too, so that they have the same bits alone as beside others."""
    return matrices[0][None] if len(matrices) == 1 and matrices[0].numel() <= SMALL else _stacked(matrices)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Several tensors as one (b, m, n); one as it is."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0]


def _apart(numbers: Numbers, count: int) -> Iterator[Numbers]:
    """The numbers of each form, from those of all."""
    S, U, Vh, *_ = numbers
    if S.dim() == 1:
        yield numbers
        return
    for i in range(count):
        yield S[i], None if U is None else U[i], None if Vh is None else Vh[i]
