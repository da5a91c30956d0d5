"""How long the experiment goes on, from how long its parts took so far."""

from __future__ import annotations

import time
from collections.abc import Callable

from spectra.reproduce.analysis import ALL, Look, looks, pairs
from spectra.reproduce.cost import points
from spectra.reproduce.plan import Plan, Run

# What the parts weigh against each other, about in seconds with SmolLM2-135M on two cores: a step as in
# figures/reproduction/runs.csv, the others roughly. How long they take here, the clock says.
_LAYERS = 30
_HEAD, _LAYER = 0.5, 0.093  # of a step of 12 examples: embeddings and logits, and a layer
_ROW = 1.4  # steps: the 512 tokens of a measurement of throughput
_START, LOAD, _SAVE = 6.0, 2.0, 2.0  # the libraries in a new process; a model
_LOOK_AT_ALL, _LOOK, _PAIR = 0.5, 0.1, 0.1  # each layer of spectra, of key and value alone, and of a comparison
_FIGURES = 20.0


def work_of_step(plan: Plan) -> float:
    """One step of training."""
    return plan.per_task * (_HEAD + _LAYER * (plan.layers or _LAYERS))


def work_of_run(run: Run, plan: Plan) -> float:
    """A run with its looks at held-out examples, which are not trained on: a third of the work each."""
    tests = len({min(plan.early, run.steps), run.steps})
    test = _SAVE + plan.held_out / plan.per_task / 3 * work_of_step(plan)
    return LOAD + run.steps * work_of_step(plan) + tests * test


def work_of_cost(plan: Plan) -> float:
    """One measurement of throughput and memory, in a process of its own."""
    return _START + (1 + plan.cost_steps) * _ROW * work_of_step(plan) / plan.per_task


def work_of_look(look: Look | None, plan: Plan) -> float:
    """The spectra of one trained model; None for one comparison."""
    each = _PAIR if look is None else _LOOK_AT_ALL if look.layers == ALL else _LOOK
    return (_START if look and look.origin else 0.5) + each * (plan.layers or _LAYERS)


def work(plan: Plan) -> float:
    """All of it."""
    runs = [*plan.main_runs(), *plan.sensitivity_runs()]
    return (
        sum(work_of_run(run, plan) for run in runs)
        + len(points(plan)) * work_of_cost(plan)
        + sum(work_of_look(look, plan) for look in looks(plan))
        + len(pairs(plan)) * work_of_look(None, plan)
        + _FIGURES
    )


class Remaining:
    """The work that is left, and the time that it takes at the pace so far.

    Args:
        total: the work to do.
        clock: seconds.

    Example:
        >>> seconds = iter([0.0, 60.0])
        >>> left = Remaining(10.0, clock=lambda: next(seconds))
        >>> left.skip(5.0)                  # an earlier call did it
        >>> left.done(1.0)                  # in a minute
        >>> left.said
        '; about 4 min left'
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._left, self._done = total, 0.0
        self._clock, self._start = clock, clock()
        self._seconds = 0.0

    def done(self, work: float) -> None:
        """So much was done since the last word."""
        self._left -= work
        self._done += work
        self._seconds = self._clock() - self._start

    def skip(self, work: float) -> None:
        """So much had been done before."""
        self._left -= work

    @property
    def said(self) -> str:
        """What to add to a line of progress; "" as long as nothing is known."""
        if self._done <= 0:
            return ""
        seconds = max(0.0, self._left) * self._seconds / self._done
        return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else "; about a minute left"
