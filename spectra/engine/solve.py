"""One delta in, one Spectrum out: read, choose the solver, check, and hand over to the next one on failure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from spectra.engine import dense, factored
from spectra.errors import SpectraError
from spectra.types import Dense, Form, LowRank, Spectrum, Status, WeightDelta

FROBENIUS_BOUND = 1e-9  # on |Σσ² − ‖ΔW‖²| / ‖ΔW‖²; float64 solvers stay below 1e-12
_ROUNDING = 1e-14  # float64, with room for the length of the sums

Triplets = tuple[Tensor, Tensor | None, Tensor | None]
Solver = tuple[str, float, Callable[[int], Triplets]]  # name, resolution relative to σ₁, top → S, U, Vh


def solve(delta: WeightDelta, *, top: int | None = None, only_top: bool = False, device: str = "cpu") -> Spectrum:
    """The spectrum of one delta; what cannot be done comes back as a status, never as a number.

    Args:
        delta: the update.
        top: how many singular vectors to keep; None for none.
        only_top: keep the top values alone, too.
        device: where to compute.
    """
    blank = Spectrum(
        delta.name, delta.shape, delta.status, max_rank=delta.max_rank, reason=delta.reason, note=delta.note
    )
    if delta.recipe is None:
        return blank
    try:
        form = delta.read(device)
    except SpectraError as problem:
        return _with(blank, "unreadable", str(problem))
    bad = _nonfinite(form)
    if bad:
        return _with(blank, "nonfinite", f"{bad} entries are NaN or infinite")
    norm = frobenius(form)
    if not math.isfinite(norm):
        return _with(blank, "nonfinite", "‖ΔW‖² overflows float64")
    known: dict[str, Any] = {"norm": norm, "base_norm": form.base_norm}
    if isinstance(form, Dense):
        known |= {"noise_edge": form.noise_edge, "unchanged": form.unchanged}
    if norm == 0:
        return _with(blank, "unchanged", "ΔW = 0", S=[0.0] * delta.max_rank, method="zero", **known)
    return _climb(blank, form, norm, top or 0, only_top, known)


def _climb(blank: Spectrum, form: Form, norm: float, top: int, only_top: bool, known: dict[str, Any]) -> Spectrum:
    """The first solver on the ladder whose result passes the check; the ones before it are recorded."""
    history: list[str] = []
    floor = _ROUNDING * _magnitude(form)
    for name, resolution, run in solvers(form):
        try:
            S, U, Vh = run(top)
        except torch.linalg.LinAlgError as problem:  # type: ignore[attr-defined]
            history.append(f"{name} failed ({str(problem).splitlines()[0]})")
            continue
        why = _fault(S, norm, floor)
        if why:
            history.append(f"{name} rejected ({why})")
            continue
        method = "; then ".join([*history, name])
        kept = S[:top] if only_top and top else S
        numbers: dict[str, Any] = {
            "S": kept.cpu().numpy(),
            "U": None if U is None else U.cpu().numpy(),
            "Vh": None if Vh is None else Vh.cpu().numpy(),
            "resolution": max(resolution * float(S[0]), floor),
            "reason": _clamped(top, blank.max_rank or 0),
        }
        return _with(blank, "ok", method=method, **(known | numbers))
    return _with(blank, "failed", f"no solver gave a result that passes the check: {'; '.join(history)}", **known)


def _clamped(top: int, max_rank: int) -> str:
    return f"top {top} is more than the rank allows: {max_rank} kept" if top > max_rank else ""


def _with(blank: Spectrum, status: Status, reason: str = "", **changes: Any) -> Spectrum:
    return replace(blank, **({"status": status, "reason": reason} | changes))


def _fault(S: Tensor, norm: float, floor: float) -> str:
    """What is wrong with singular values, given ‖ΔW‖_F and the absolute rounding floor; "" for nothing."""
    if not bool(torch.isfinite(S).all()):
        return "values that are not finite"
    if bool((S < 0).any()) or bool((S[1:] > S[:-1]).any()):
        return "values that are negative or not descending"
    total = float(S.square().sum())
    if abs(total - norm**2) > FROBENIUS_BOUND * norm**2 + 2 * floor * norm:
        return f"Σσ² = {total:.12e} is not ‖ΔW‖² = {norm**2:.12e}"
    return ""


@singledispatch
def frobenius(form: Form) -> float:
    """‖ΔW‖_F of a form."""
    raise TypeError(f"no norm rule for {type(form).__name__}")


@singledispatch
def solvers(form: Form) -> list[Solver]:
    """The ladder of solvers for a form, the first choice first."""
    raise TypeError(f"no SVD rule for {type(form).__name__}")


@singledispatch
def _tensors(form: Form) -> tuple[Tensor, ...]:
    raise TypeError(f"{type(form).__name__} does not say which tensors it is made of")


@singledispatch
def _magnitude(form: Form) -> float:
    """What rounding errors in ΔW itself are relative to; 0 where its entries are given."""
    return 0.0


def _nonfinite(form: Form) -> int:
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in _tensors(form))


@frobenius.register
def _(form: Dense) -> float:
    return float(form.matrix.norm())


@frobenius.register
def _(form: LowRank) -> float:
    return factored.factored_norm(form.left, form.right)


@_tensors.register
def _(form: Dense) -> tuple[Tensor, ...]:
    return (form.matrix,)


@_tensors.register
def _(form: LowRank) -> tuple[Tensor, ...]:
    return (form.left, form.right)


@_magnitude.register
def _(form: LowRank) -> float:
    return factored.magnitude(form.left, form.right)


@solvers.register
def _(form: Dense) -> list[Solver]:
    A = form.matrix
    return [
        (
            "gram-eigh-f64",
            dense.GRAM_RESOLUTION,
            lambda top: dense.gram_top(A, top) if top else (dense.gram_values(A), None, None),
        ),
        (
            "svd-f64",
            dense.SVD_RESOLUTION,
            lambda top: dense.svd_top(A, top) if top else (dense.svd_values(A), None, None),
        ),
    ]


@solvers.register
def _(form: LowRank) -> list[Solver]:
    def through_product(top: int) -> Triplets:
        # Only after the QR route failed: its cost is that of a dense update.
        S, U, Vh = dense.svd_top(form.to_dense(), max(top, 1))
        count = min(form.left.shape[1], *form.shape)
        return S[:count], U if top else None, Vh if top else None

    return [
        ("qr-core-svd-f64", dense.SVD_RESOLUTION, lambda top: factored.factored_svd(form.left, form.right, top)),
        ("product-svd-f64", dense.SVD_RESOLUTION, through_product),
    ]
