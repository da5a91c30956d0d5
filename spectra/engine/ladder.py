"""Which solvers a form of ΔW has, the first choice first. The next one runs only if one fails, and that is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, singledispatch

from torch import Tensor

from spectra.deltas.forms import Dense, Form, Kronecker, LowRank
from spectra.engine.solvers import dense, factored, kronecker, topk

Numbers = tuple[Tensor, Tensor | None, Tensor | None]  # S, U, Vh


@dataclass(frozen=True)
class Rung:
    """What a solver is called and what it can tell apart.

    Attributes:
        name: what the result's `method` says.
        resolution: values at or below it, relative to σ₁, are not resolved.
        complete: whether S holds every value.
    """

    name: str
    resolution: float
    complete: bool = True


CHOLESKY_CORE = Rung("cholesky-qr2-core-svd-f64", dense.SVD_RESOLUTION)
QR_CORE = Rung("qr-core-svd-f64", dense.SVD_RESOLUTION)
KRONECKER = Rung("kronecker-svd-f64", dense.SVD_RESOLUTION)
PRODUCT = Rung("product-svd-f64", dense.SVD_RESOLUTION)
GRAM_VALUES = Rung("gram-eigvals-f64", dense.GRAM_RESOLUTION)
GRAM_LANCZOS = Rung("gram-lanczos-f64", dense.GRAM_RESOLUTION)
GRAM_CERTIFIED = Rung("gram-lanczos-certified-f64", dense.GRAM_RESOLUTION, complete=False)
GRAM_EIGH = Rung("gram-eigh-f64", dense.GRAM_RESOLUTION)
SVD = Rung("svd-f64", dense.SVD_RESOLUTION)


@dataclass(frozen=True)
class Solver:
    """One rung and how to run it: `run()` gives S, and U and Vh if vectors were asked for."""

    rung: Rung
    run: Callable[[], Numbers]


def batched(form: Form, top: int) -> Rung:
    """The rung whose solver takes many updates of one shape at once."""
    if isinstance(form, Kronecker):
        return KRONECKER
    if isinstance(form, LowRank):
        return CHOLESKY_CORE if _both_tall(form) else QR_CORE
    return GRAM_EIGH if top else GRAM_VALUES


@singledispatch
def solvers(form: Form, top: int, only_top: bool) -> list[Solver]:
    """The ladder for a form.

    Args:
        form: ΔW.
        top: how many vectors; 0 for none.
        only_top: the other values are not needed.
    """
    raise TypeError(f"no SVD rule for {type(form).__name__}")


@solvers.register
def _(form: Dense, top: int, only_top: bool) -> list[Solver]:
    A = form.matrix
    if not top:
        return [
            Solver(GRAM_VALUES, lambda: (dense.gram_values(A), None, None)),
            Solver(SVD, lambda: (dense.svd_values(A), None, None)),
        ]
    product = cache(lambda: dense.gram(A))  # one Gram matrix for all rungs
    first, run = (GRAM_CERTIFIED, dense.lanczos_only_top) if only_top else (GRAM_LANCZOS, dense.lanczos_top)
    lanczos = [Solver(first, lambda: run(A, top, product()))] if topk.worthwhile(min(A.shape), top) else []
    return [
        *lanczos,
        Solver(GRAM_EIGH, lambda: dense.gram_top(A, top, product() if lanczos else None)),
        Solver(SVD, lambda: dense.svd_top(A, top)),
    ]


@solvers.register
def _(form: LowRank, top: int, only_top: bool) -> list[Solver]:
    def through_product() -> Numbers:
        # Only after the QR route failed: its cost is that of a dense update.
        S, U, Vh = dense.svd_top(form.to_dense(), max(top, 1))
        count = min(form.left.shape[1], *form.shape)
        return S[:count], U[:, :count] if top else None, Vh[:count] if top else None

    by_factors = [Solver(QR_CORE, lambda: factored.factored_svd(form.left, form.right, top))]
    if _both_tall(form):
        fast = Solver(CHOLESKY_CORE, lambda: factored.factored_svd(form.left, form.right, top, form.grams))
        by_factors = [fast, *by_factors]
    return [*by_factors, Solver(PRODUCT, through_product)]


def _both_tall(form: LowRank) -> bool:
    """Whether L and Rᵀ have at least as many rows as columns, without which they cannot be of full rank."""
    return form.left.shape[1] <= min(form.shape)


@solvers.register
def _(form: Kronecker, top: int, only_top: bool) -> list[Solver]:
    def through_product() -> Numbers:
        S, U, Vh = dense.svd_top(form.to_dense(), max(top, 1))
        return S, U if top else None, Vh if top else None

    return [
        Solver(KRONECKER, lambda: kronecker.kronecker_svd(form.first, form.second, top)),
        Solver(PRODUCT, through_product),
    ]
