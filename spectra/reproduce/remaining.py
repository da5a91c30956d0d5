"""How long the experiment goes on, from how long its parts took so far."""

from __future__ import annotations

import time
from collections.abc import Callable

from spectra.reproduce.analysis import ALL, Look, looks, pairs
from spectra.reproduce.cost import points
from spectra.reproduce.plan import Plan, Run

# What else there is to do, in steps of training on two cores: the clock says how long a step is.
LOOK, LOOK_AT_ALL = 1.0, 6.0  # decompose key and value, or all matrices, of a run
PAIR = 1.0
COST_STEP = 0.7  # a row of 512 tokens
LOAD, SAVE = 1.0, 1.0
FIGURES = 5.0


def work_of_run(run: Run, plan: Plan) -> float:
    """A run with its looks at held-out examples, of which one costs a third of a training example."""
    tests = len({min(plan.early, run.steps), run.steps})
    return LOAD + run.steps + tests * (SAVE + plan.held_out / plan.per_task / 3)


def work_of_cost(plan: Plan) -> float:
    """One measurement of throughput and memory."""
    return LOAD + (1 + plan.cost_steps) * COST_STEP


def work_of_look(look: Look) -> float:
    """The spectra of one trained model."""
    return LOOK_AT_ALL if look.layers == ALL else LOOK


def work(plan: Plan) -> float:
    """All of it."""
    runs = [*plan.main_runs(), *plan.sensitivity_runs()]
    return (
        sum(work_of_run(run, plan) for run in runs)
        + len(points(plan)) * work_of_cost(plan)
        + sum(map(work_of_look, looks(plan)))
        + len(pairs(plan)) * PAIR
        + FIGURES
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
