"""The one engine: read ΔW, look at it, climb the ladder of solvers, check. What cannot be done gets a status.

Updates of one shape go through it together. A CPU takes them one at a time, which is a batch of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra.deltas import at_work
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import SMALL, Dense, Form, know_together
from spectra.deltas.relatedness import unrelated_note
from spectra.deltas.rounding import Noise
from spectra.deltas.together import read_small
from spectra.engine import check
from spectra.engine.devices import Device, device_named
from spectra.engine.extremes import put_back, within_range
from spectra.engine.flips import with_flips
from spectra.engine.ladder import Ladder, Numbers, Rung, Solver, ladder_for
from spectra.engine.noise import plausible_noise, with_artefacts
from spectra.engine.solvers.topk import NotConvergedError
from spectra.errors import SpectraError
from spectra.spectrum import Spectrum

ROUNDING_ONLY = (
    "no singular value is above what storage rounding alone gives: this update may be rounding and nothing else"
)
_ROUNDING = 1e-14  # float64, with room for the length of the sums
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory", "_ALLOC_FAILED")
# After one of these a card answers nothing more to the process, whatever it is asked.
_LOST = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "launch failure",
    "device-side assert",
    "hardware stack error",
    "uncorrectable ECC error",
)


@dataclass(frozen=True)
class Wanted:
    """What to compute of every update, and where.

    Attributes:
        top: how many singular vectors; 0 for none.
        only_top: keep the top values alone, too.
        device: where the forms are.
        together: whether it is given several of a shape at once: solvers that gain from it come first.
    """

    top: int = 0
    only_top: bool = False
    device: Device = field(default_factory=lambda: device_named("cpu"))
    together: bool = False


@dataclass(frozen=True)
class Unsolved:
    """An update that is read and has something to solve.

    Attributes:
        form: ΔW.
        blank: its result as it was before ΔW was read.
        known: its result so far: norms, rounding, what the files tell.
        exponent: e of the power of two by which the form was divided to come into float64's range.
    """

    form: Form
    blank: Spectrum
    known: Spectrum
    exponent: int = 0


@dataclass(frozen=True)
class GaveUp:
    """Why a solver gave no numbers: not the exception itself, whose traceback would keep tensors in memory."""

    said: str
    out_of_memory: bool

    @property
    def lost(self) -> bool:
        """Whether the device answers nothing more."""
        return any(words in self.said for words in _LOST)

    @classmethod
    def over(cls, problem: Exception) -> GaveUp:
        """From what was raised."""
        return cls((str(problem) or type(problem).__name__).splitlines()[0], out_of_memory(problem))


def solve(delta: WeightDelta, *, top: int | None = None, only_top: bool = False, device: str = "cpu") -> Spectrum:
    """The spectrum of one delta; what cannot be done comes back as a status, never as a number.

    Args:
        delta: the update.
        top: how many singular vectors to keep; None for none.
        only_top: keep the top values alone, too.
        device: where to compute.
    """
    wanted = Wanted(top or 0, only_top, device_named(device))
    return solve_forms([delta], [read(delta, device)], wanted)[0]


def solve_together(
    deltas: Sequence[WeightDelta], *, top: int | None = None, only_top: bool = False, device: str = "cpu"
) -> list[Spectrum]:
    """As `solve`, of several, in their order: small ones of equal shapes as one, with the numbers of each alone."""
    wanted = Wanted(top or 0, only_top, device_named(device))
    return solve_forms(deltas, read_together(deltas, device), wanted)


def read(delta: WeightDelta, device: str, finish: Callable[[], None] = lambda: None) -> Form | Spectrum:
    """The form of a delta on the device, or its result if there is none.

    Args:
        delta: the update.
        device: where its tensors go.
        finish: waits until they are there.
    """
    if delta.recipe is None:
        return _blank(delta)
    try:
        form = delta.read(device)
        finish()
        return form
    except SpectraError as problem:
        return replace(_blank(delta), status="unreadable", reason=str(problem))
    except (MemoryError, RuntimeError) as problem:
        return _undone(_blank(delta), GaveUp.over(problem), device)


def read_together(deltas: Sequence[WeightDelta], device: str) -> list[Form | Spectrum]:
    """As `read`, of several: small differences of equal shapes are read as one, with the same numbers.

    Args:
        deltas: the updates.
        device: where their tensors go.
    """
    small: dict[int, Dense] = {}
    if device == "cpu" and len(deltas) > 1:
        with at_work.in_hands("reading", deltas[0].name, deltas[0].shape), suppress(MemoryError, RuntimeError):
            small = read_small(deltas)
    return [small[i] if i in small else read(delta, device) for i, delta in enumerate(deltas)]


def solve_forms(deltas: Sequence[WeightDelta], forms: Sequence[Form | Spectrum], wanted: Wanted) -> list[Spectrum]:
    """The spectra of deltas that are read, in their order; those whose tensors have equal shapes are solved as one.

    Args:
        deltas: the updates.
        forms: what `read` gave for each.
        wanted: what to compute.

    Example:
        >>> delta = WeightDelta.from_tensor("a.weight", torch.diag(torch.tensor([3.0, 4.0])))
        >>> [spectrum.S.tolist() for spectrum in solve_forms([delta], [delta.read()], Wanted())]
        [[4.0, 3.0]]
    """
    done: dict[int, Spectrum] = {}
    alike: dict[tuple, dict[int, Unsolved]] = {}
    with at_work.in_hands("solving", deltas[0].name, deltas[0].shape):
        _know(forms)
        for place, (delta, form) in enumerate(zip(deltas, forms, strict=True)):
            examined = form if isinstance(form, Spectrum) else _examined(_blank(delta), form, wanted.device.name)
            if isinstance(examined, Spectrum):
                done[place] = examined
            else:
                shapes = (type(examined.form), *(tensor.shape for tensor in examined.form.tensors))
                alike.setdefault(shapes, {})[place] = examined
        for group in alike.values():
            done |= zip(group, _solved(list(group.values()), wanted), strict=True)
    return [done[place] for place in range(len(deltas))]


def _know(forms: Sequence[Form | Spectrum]) -> None:
    """What there is to know of small matrices without solving them, of those of one shape at once."""
    alike: dict[tuple[int, ...], list[Dense]] = {}
    for form in forms:
        if isinstance(form, Dense) and 0 < form.matrix.numel() <= SMALL and form.matrix.device.type == "cpu":
            alike.setdefault(form.shape, []).append(form)
    for group in alike.values():
        with suppress(MemoryError, RuntimeError):  # of one alone it is found again, and told
            know_together(group)


def _blank(delta: WeightDelta) -> Spectrum:
    """What is known of a delta's result before it is read."""
    return Spectrum(
        delta.name, delta.shape, delta.status, max_rank=delta.max_rank, reason=delta.reason, note=delta.note
    )


def _examined(blank: Spectrum, form: Form, device: str) -> Spectrum | Unsolved:
    """What is known of an update without solving it; its result where that is all (zero, not finite)."""
    try:
        return _with_norms(blank, form)
    except (MemoryError, RuntimeError) as problem:
        return _undone(blank, GaveUp.over(problem), device)


def _with_norms(blank: Spectrum, given: Form) -> Spectrum | Unsolved:
    form, exponent = within_range(given)
    norm = form.norm
    if not math.isfinite(norm):
        bad = sum(int((~tensor.isfinite()).sum()) for tensor in form.tensors)
        reason = f"{bad} entries are NaN or infinite" if bad else "‖ΔW‖² overflows float64"
        return replace(blank, status="nonfinite", reason=reason)
    if norm == 0 and not form.is_zero:
        return replace(blank, status="failed", reason="‖ΔW‖² underflows float64")
    known = replace(
        blank,
        norm=norm,
        base_norm=form.base_norm,
        base_cosine=form.base_cosine,
        resolution=_ROUNDING * form.magnitude,
        unmoved_share=form.unchanged,
        moved=given.moved,
        note=_told(blank.note, form),
        **{"noise_edge": form.noise_edge} | _noise_of(form.noise[0] if form.noise else None),
    )
    if norm == 0:  # where nothing moved, nothing speaks for more than one rounding
        zeros = np.zeros(blank.max_rank or 0)
        known = replace(known, **_noise_of(form.noise[-1] if form.noise else None))
        return replace(known, status="unchanged", reason="ΔW = 0", S=zeros, method="zero")
    return Unsolved(form, blank, known, exponent)


def _told(note: str, form: Form) -> str:
    """The note, and where ΔW is the difference of two stored weights that are not related, that as well."""
    return "; ".join(filter(None, (note, unrelated_note(form.base_cosine, form.unchanged))))


def _solved(cases: Sequence[Unsolved], wanted: Wanted) -> Iterator[Spectrum]:
    """The results of updates of equal shapes: the first solver takes all; what it leaves climbs on one by one."""
    ladder = ladder_for(cases[0].form, wanted.top, wanted.only_top, together=wanted.together)
    outcomes, remark = _attempt(ladder[0], [case.form for case in cases], wanted.device)
    for case, outcome in zip(cases, outcomes, strict=True):
        try:
            found = _climb(case, ladder, outcome, [remark] if remark else [], wanted)
        except (MemoryError, RuntimeError) as problem:  # of the check
            found = _undone(case.blank, GaveUp.over(problem), wanted.device.name)
        yield put_back(found, case.exponent)


def _attempt(solver: Solver, forms: Sequence[Form], device: Device) -> tuple[list[Numbers | GaveUp], str]:
    """Numbers per form, or why there are none; several that memory is too small for are halved, and that is said."""
    try:
        return list(solver.run(forms)), ""
    except (NotConvergedError, MemoryError, RuntimeError) as problem:
        gave_up = GaveUp.over(problem)
    if len(forms) == 1 or gave_up.lost:
        return [gave_up] * len(forms), ""
    if not gave_up.out_of_memory:
        return [_attempt(solver, [form], device)[0][0] for form in forms], ""
    device.release()
    half = (len(forms) + 1) // 2
    first, second = (_attempt(solver, part, device)[0] for part in (forms[:half], forms[half:]))
    return [*first, *second], f"batch of {len(forms)} halved for want of memory"


def _climb(case: Unsolved, ladder: Ladder, outcome: Numbers | GaveUp, tried: list[str], wanted: Wanted) -> Spectrum:
    """The result of the first solver on the ladder that passes the check; the ones before it are recorded.

    Args:
        case: the update.
        ladder: the solvers, first choice first.
        outcome: what the first one gave.
        tried: what is to be told of what went before.
        wanted: what to compute.
    """
    for solver in ladder:
        if solver is not ladder[0]:
            (outcome,), _ = _attempt(solver, [case.form], wanted.device)
        if isinstance(outcome, GaveUp):
            tried.append(f"{solver.rung.name} gave up ({outcome.said})")
            if outcome.lost:
                return _undone(case.blank, outcome, wanted.device.name)
            # Where several are solved at once, what is too large for that may still be solved otherwise.
            if outcome.out_of_memory and not (wanted.together and solver.joint):
                return _undone(case.blank, outcome, wanted.device.name)
            continue
        why = _fault(case, solver.rung, outcome)
        if not why:
            return _accepted(case, solver.rung, outcome, tried, wanted)
        tried.append(f"{solver.rung.name} rejected ({why})")
    reason = f"no solver gave a result that passes the check: {'; '.join(tried)}"
    return replace(case.known, status="failed", reason=reason)


def _fault(case: Unsolved, rung: Rung, numbers: Numbers) -> str:
    """What is wrong with a solver's result; "" for nothing."""
    S, U, Vh, *known = numbers
    fourth = known[0] if known else case.form.fourth_moment
    count = case.form.max_rank if rung.complete else None
    why = check.value_fault(S, case.form.norm, case.known.resolution, rung.complete, fourth=fourth, count=count)
    if why or U is None or Vh is None:
        return why
    return check.vector_fault(case.form, S, U, Vh, _resolution(case.known, rung, S))


def _accepted(case: Unsolved, rung: Rung, numbers: Numbers, tried: list[str], wanted: Wanted) -> Spectrum:
    """The result, with the solver and the ones that failed before it."""
    known = case.known
    S, U, Vh, *_ = numbers
    rank, values = known.max_rank or 0, S.cpu().numpy()
    told = plausible_noise(case.form.noise, values, case.form.norm, known.shape)
    if told is not None and isinstance(case.form, Dense):
        told = with_artefacts(with_flips(told, case.form, values), case.form, values)
    noise = _noise_of(told)
    return replace(
        known,
        S=values[: wanted.top] if wanted.only_top and wanted.top else values,
        U=None if U is None else U.cpu().numpy(),
        Vh=None if Vh is None else Vh.cpu().numpy(),
        resolution=_resolution(known, rung, values),
        status="ok",
        reason=f"top {wanted.top} is more than the rank allows: {rank} kept" if wanted.top > rank else "",
        method="; then ".join([*tried, rung.name]),
        note="; ".join(
            filter(None, (known.note, _nothing_but_rounding(noise.get("noise_edge", known.noise_edge), values)))
        ),
        **noise,
    )


def _nothing_but_rounding(edge: float | None, S: np.ndarray) -> str:
    """Said of an update of which nothing is above the rounding edge."""
    return ROUNDING_ONLY if (edge or 0.0) >= float(S[0]) else ""


def _noise_of(noise: Noise | None) -> dict[str, Any]:
    """What a spectrum says of the rounding by one story; nothing where there is none."""
    if noise is None:
        return {}
    return {
        "noise_edge": noise.edge if noise.known else None,
        "noise_energy": noise.energy if noise.known else None,
        "rounding": noise.said,
        "base_rounding": noise.base_too,
    }


def _resolution(known: Spectrum, rung: Rung, S: Tensor | np.ndarray) -> float:
    """What the result cannot tell apart: by the solver, or by rounding in ΔW itself."""
    return max(rung.resolution_of(known.shape) * float(S[0]), known.resolution)


def _undone(blank: Spectrum, problem: GaveUp, device: str) -> Spectrum:
    """The result where computing raised: too_large if memory ran out, else failed, with what was said."""
    if problem.out_of_memory:
        reason = f"memory ran out on {device}: {problem.said}; lower --workers or --memory"
        return replace(blank, status="too_large", reason=reason)
    if problem.lost:
        reason = (
            f"{device} failed and answers nothing more here: {problem.said}; run again, or with device=cpu (--device)"
        )
        return replace(blank, status="failed", reason=reason)
    return replace(blank, status="failed", reason=problem.said)


def out_of_memory(problem: BaseException) -> bool:
    """Whether torch or Python ran out of memory, on any device."""
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in _NO_MEMORY)
