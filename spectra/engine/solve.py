"""One delta in, one Spectrum out: read, climb the ladder of solvers, check; what cannot be done gets a status."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import singledispatch
from typing import Any

from torch import OutOfMemoryError, Tensor

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Form, Kronecker, LowRank
from spectra.engine import check
from spectra.engine.ladder import Numbers, Rung, Solver, solvers
from spectra.engine.solvers import factored
from spectra.engine.solvers.topk import NotConvergedError
from spectra.errors import SpectraError
from spectra.spectrum import Spectrum, Status

_ROUNDING = 1e-14  # float64, with room for the length of the sums
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory")


def solve(delta: WeightDelta, *, top: int | None = None, only_top: bool = False, device: str = "cpu") -> Spectrum:
    """The spectrum of one delta; what cannot be done comes back as a status, never as a number.

    Args:
        delta: the update.
        top: how many singular vectors to keep; None for none.
        only_top: keep the top values alone, too.
        device: where to compute.
    """
    blank = blank_for(delta)
    if delta.recipe is None:
        return blank
    try:
        form = delta.read(device)
        return solve_form(blank, form, top or 0, only_top)
    except SpectraError as problem:
        return with_status(blank, "unreadable", str(problem))
    except (MemoryError, RuntimeError) as problem:
        return after_failure(blank, problem, device)


def solve_form(blank: Spectrum, form: Form, top: int, only_top: bool) -> Spectrum:
    """The spectrum of an update that is already read."""
    settled, known = examine(blank, form)
    return settled or climb(blank, form, solvers(form, top, only_top), top, only_top, known)


def blank_for(delta: WeightDelta) -> Spectrum:
    """What is known of a delta's result before it is read."""
    return Spectrum(
        delta.name, delta.shape, delta.status, max_rank=delta.max_rank, reason=delta.reason, note=delta.note
    )


def examine(blank: Spectrum, form: Form) -> tuple[Spectrum | None, dict[str, Any]]:
    """The result if there is nothing to solve (zero, not finite), and what is known of the update anyway."""
    norm, magnitude = norms(form)
    known: dict[str, Any] = {"norm": norm, "base_norm": form.base_norm, "resolution": _ROUNDING * magnitude}
    if isinstance(form, Dense):
        known |= {"noise_edge": form.noise_edge, "unchanged": form.unchanged}
    if not math.isfinite(norm):
        bad = sum(int((~tensor.isfinite()).sum()) for tensor in tensors_of(form))
        reason = f"{bad} entries are NaN or infinite" if bad else "‖ΔW‖² overflows float64"
        return with_status(blank, "nonfinite", reason), known
    if norm == 0 and isinstance(form, Dense) and bool(form.matrix.any()):
        return with_status(blank, "failed", "‖ΔW‖² underflows float64"), known
    if norm == 0:
        return with_status(blank, "unchanged", "ΔW = 0", S=[0.0] * (blank.max_rank or 0), method="zero", **known), known
    return None, known


def climb(
    blank: Spectrum,
    form: Form,
    ladder: list[Solver],
    top: int,
    only_top: bool,
    known: dict[str, Any],
    history: str = "",
) -> Spectrum:
    """The first solver on the ladder whose result passes the check; the ones before it are recorded.

    Args:
        blank: the result so far.
        form: the update.
        ladder: the solvers, first choice first.
        top: how many vectors; 0 for none.
        only_top: keep the top values alone.
        known: norms and what else goes into the result.
        history: what was tried before.
    """
    tried = [history] if history else []
    for solver in ladder:
        try:
            numbers = solver.run()
        except (NotConvergedError, RuntimeError) as problem:
            if out_of_memory(problem):
                raise
            tried.append(f"{solver.rung.name} gave up ({str(problem).splitlines()[0]})")
            continue
        why = fault(form, solver.rung, numbers, known)
        if not why:
            return accepted(blank, solver.rung, numbers, top, only_top, known, tried)
        tried.append(f"{solver.rung.name} rejected ({why})")
    return with_status(blank, "failed", f"no solver gave a result that passes the check: {'; '.join(tried)}", **known)


def fault(form: Form, rung: Rung, numbers: Numbers, known: dict[str, Any]) -> str:
    """What is wrong with a solver's result; "" for nothing."""
    S, U, Vh = numbers
    why = check.value_fault(S, known["norm"], known["resolution"], rung.complete)
    if why or U is None or Vh is None:
        return why
    return check.vector_fault(form, S, U, Vh, _resolution(rung, S, known))


def accepted(
    blank: Spectrum,
    rung: Rung,
    numbers: Numbers,
    top: int,
    only_top: bool,
    known: dict[str, Any],
    tried: list[str],
) -> Spectrum:
    """The result, with the solver and the ones that failed before it."""
    S, U, Vh = numbers
    found: dict[str, Any] = {
        "S": (S[:top] if only_top and top else S).cpu().numpy(),
        "U": None if U is None else U.cpu().numpy(),
        "Vh": None if Vh is None else Vh.cpu().numpy(),
        "resolution": _resolution(rung, S, known),
    }
    rank = blank.max_rank or 0
    clamped = f"top {top} is more than the rank allows: {rank} kept" if top > rank else ""
    return with_status(blank, "ok", clamped, method="; then ".join([*tried, rung.name]), **(known | found))


def _resolution(rung: Rung, S: Tensor, known: dict[str, Any]) -> float:
    return max(rung.resolution * float(S[0]), known["resolution"])


def out_of_memory(problem: BaseException) -> bool:
    """Whether torch or Python ran out of memory, on any device."""
    if isinstance(problem, MemoryError | OutOfMemoryError):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in _NO_MEMORY)


def after_failure(blank: Spectrum, problem: BaseException, device: str) -> Spectrum:
    """The result where computing raised: too_large if memory ran out, else failed, with what was said."""
    said = (str(problem) or type(problem).__name__).splitlines()[0]
    if out_of_memory(problem):
        return with_status(blank, "too_large", f"memory ran out on {device}: {said}; lower --workers or --memory")
    return with_status(blank, "failed", said)


def with_status(blank: Spectrum, status: Status, reason: str = "", **changes: Any) -> Spectrum:
    """The result with a status, a reason and whatever else is known."""
    return replace(blank, **({"status": status, "reason": reason} | changes))


@singledispatch
def norms(form: Form) -> tuple[float, float]:
    """‖ΔW‖_F, not finite if an entry is not; and what rounding errors in ΔW are relative to, 0 where it is given."""
    raise TypeError(f"no norm rule for {type(form).__name__}")


@singledispatch
def tensors_of(form: Form) -> tuple[Tensor, ...]:
    """The tensors that a form is made of."""
    raise TypeError(f"{type(form).__name__} does not say which tensors it is made of")


@norms.register
def _(form: Dense) -> tuple[float, float]:
    return float(form.matrix.norm()), 0.0


@norms.register
def _(form: LowRank) -> tuple[float, float]:
    return factored.factored_norm(form)


@tensors_of.register
def _(form: Dense) -> tuple[Tensor, ...]:
    return (form.matrix,)


@tensors_of.register
def _(form: LowRank) -> tuple[Tensor, ...]:
    return (form.left, form.right)


@norms.register
def _(form: Kronecker) -> tuple[float, float]:
    return float(form.first.norm() * form.second.norm()), 0.0


@tensors_of.register
def _(form: Kronecker) -> tuple[Tensor, ...]:
    return (form.first, form.second)
