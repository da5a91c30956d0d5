"""`Watch`: the spectra of updates while they are trained, in any loop, at a bounded cost."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra.deltas.delta import WeightDelta
from spectra.engine.devices import device_named
from spectra.engine.solve import Wanted, out_of_memory, solve_forms
from spectra.errors import StoreError
from spectra.results.homes import home_of
from spectra.results.series import KIND, row, series_rows
from spectra.results.series_table import by_role, step_folder, stored_steps
from spectra.results.start import Start
from spectra.results.store import Store
from spectra.results.tables import Row
from spectra.spectrum import Spectrum
from spectra.training.config import AdapterError
from spectra.training.targets import modules_of
from spectra.training.watched import Watched, watched_matrices

LOGGED = ("norm", "stable_rank", "top_1_share", "effective_rank", "phi_to_previous", "start_left", "start_right")
_START = "the start of training"


class Watch:
    """Measures the updates of a model every so many steps: call it with the step, after each step of the optimizer.

    What is measured is ΔW since the start, which is when the watch is made: from the factors where there is an adapter,
    else from a copy of the weight. Everything is computed in float64 whatever the training's precision, and nothing of
    the training changes. Spectra with their top vectors are kept in `out`, a directory that `spectra series --out`,
    `spectra plot` and `spectra.series(out=…)` read, each step's also `spectra.load`.

    The cost is bounded: where the next measurement, taken to cost what the last one did, would make it more than
    `max_share` of the time since the start, it is put off until it does not. The first one, whose cost is not known
    yet, and the last one, when the watch is closed, are made in any case.

    Args:
        model: with adapters of PEFT's LoRA or of `spectra.adapters`, or in full training.
        every: steps of the optimizer between measurements; micro-steps of accumulated gradients do not count.
        matrices: patterns of weights as `--layer` takes them; () for every adapted one.
        top: how many singular vectors are kept and compared.
        out: where to keep everything; None for nothing but the numbers that each call gives.
        max_share: the most of the run's time that measuring may take, above 0; 1 for no bound.
        values: all singular values; False for the top ones alone, which is faster for large weights in full training
            and leaves effective ranks out.
        heads: which ΔW of routed heads: "mean", "sum" or an index.
        step: the step at which the watch is made; more than 0 goes on with what `out` has of the same run.

    Attributes:
        seconds: what measuring has cost so far.
        put_off: how many due measurements were put off.

    Raises:
        AdapterError: nothing can be watched, `every` or `max_share` is out of its range, or the start is gone.
        SelectionError: a pattern matches nothing.
        StoreError: `out` holds something else, or cannot be written to.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> watch = Watch(model, every=2, matrices="0", max_share=1.0)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.add_(torch.diag(torch.tensor([0.0, 2.0])))
        >>> watch(1), round(watch(2)["spectra/0/norm"], 6)
        ({}, 2.0)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        matrices: str | Sequence[str] = (),
        top: int = 10,
        out: str | Path | None = None,
        max_share: float = 0.05,
        values: bool = True,
        heads: str | int | None = None,
        step: int = 0,
    ) -> None:
        check_options(every=every, top=top, max_share=max_share)
        self.model = model
        self.every, self.top, self.max_share, self.values = every, top, max_share, values
        self.out = None if out is None else home_of(out)
        self.seconds, self.put_off = 0.0, 0
        self._began = time.perf_counter()
        self._due, self._waits = step - step % every + every, False
        self._measured_at, self._expected = step, 0.0
        self._previous: dict[str, Spectrum] = {}
        self._watched = watched_matrices(model, matrices, heads=heads, resumed=step > 0)
        if self.out is not None:
            self._claim(self.out, step)
        self._start = Start(top, self.out, _START, before_training=True)
        self._saw_start = step == 0
        if self._saw_start:
            for watched in self._watched:
                self._keep_factors(watched, modules_of(model))

    @property
    def names(self) -> tuple[str, ...]:
        """The watched weights."""
        return tuple(watched.name for watched in self._watched)

    @property
    def share(self) -> float:
        """What part of the time since the start was spent on measuring."""
        return self.seconds / max(time.perf_counter() - self._began, 1e-9)

    def __call__(self, step: int) -> dict[str, float]:
        """Measure if it is due and affordable: name → number, ready to be logged; {} otherwise.

        The names are `spectra/<role>/<metric>`, medians over the layers of a role, and `spectra/seconds`,
        `spectra/share` for the cost.

        Args:
            step: how many steps of the optimizer are done.

        Raises:
            StoreError: `out` cannot be written to.
        """
        if step < self._due:
            return {}
        affordable = self.max_share * (time.perf_counter() - self._began)
        if self.max_share < 1 and self._expected and self.seconds + self._expected > affordable:
            self.put_off += not self._waits
            self._waits = True
            return {}
        self._due, self._waits = step - step % self.every + self.every, False
        return self.measure(step)

    def measure(self, step: int) -> dict[str, float]:
        """Measure now, whatever is due; what it gives is as of a call."""
        began = time.perf_counter()
        modules = modules_of(self.model)
        rows: list[Row] = []
        store = None if self.out is None else Store(step_folder(self.out, step))
        if store is not None:
            inputs: dict[str, Any] = {
                "kind": "watched",
                "tuned": f"step {step} of training",
                "base": None,
                "options": {},
            }
            store.begin(inputs, {"top": self.top})
        for watched in self._watched:
            spectrum = _spectrum(watched, modules, Wanted(self.top, only_top=not self.values))
            if store is not None:
                store.put(spectrum)
            self._see_start(watched, spectrum, modules)
            before = self._previous.get(spectrum.name)
            others = {"previous": before} if before is not None else {}
            rows.append(row(step, "", spectrum, self._start, others, top=self.top))
            self._previous[spectrum.name] = spectrum
        if store is not None:
            store.finish()
        self._measured_at = step
        self._expected = time.perf_counter() - began
        self.seconds += self._expected
        return _logged(rows) | {"spectra/seconds": self.seconds, "spectra/share": self.share}

    def close(self, step: int | None = None) -> dict[str, float]:
        """Measure once more if training went on since the last time, and write the table of all steps.

        Args:
            step: the last step; None for the last that was measured.

        Raises:
            StoreError: `out` cannot be written to.
        """
        numbers = self.measure(step) if step is not None and step > self._measured_at else {}
        if self.out is not None and stored_steps(self.out):
            for _ in series_rows(top=self.top, out=self.out):
                pass  # writes the table
        return numbers

    def _claim(self, out: Path, step: int) -> None:
        """Make the directory this run's; steps that were measured after the one that it goes on from are undone."""
        stored = stored_steps(out)
        if stored and step == 0:
            raise StoreError(f"{out} holds steps of an earlier run: delete it, or watch into another directory (out=)")
        for later in stored:
            if later > step:
                shutil.rmtree(stored[later])
        store = Store(out)
        if store.kind() not in (None, KIND):
            raise StoreError(f"{out} holds results of another command: watch into another directory (out=)")
        store.begin({"kind": KIND, "base": None, "options": {"watched": True}}, {"command": sys.argv})

    def _see_start(self, watched: Watched, spectrum: Spectrum, modules: dict[str, nn.Module]) -> None:
        """Sides that had no directions at the start, such as that of a B of zeros, get the first that there are."""
        if not self._saw_start or self._start.is_known(spectrum.name):
            return
        if watched.factored:
            self._keep_factors(watched, modules)
        else:
            self._start.see(spectrum)

    @torch.no_grad()
    def _keep_factors(self, watched: Watched, modules: dict[str, nn.Module]) -> None:
        factors = watched.start_factors(modules)
        if factors is not None:
            self._start.put(watched.name, *(factor.cpu().numpy() for factor in factors))


def check_options(*, every: int, top: int, max_share: float) -> None:
    """Refuse what is out of its range.

    Raises:
        AdapterError: it is.
    """
    if every < 1 or top < 1:
        raise AdapterError(f"every = {every} and top = {top} have to be positive")
    if not 0 < max_share <= 1:
        raise AdapterError(f"max_share = {max_share} is not a share of the time, above 0 and at most 1")


@torch.no_grad()
def _spectrum(watched: Watched, modules: dict[str, nn.Module], wanted: Wanted) -> Spectrum:
    """The spectrum of one matrix as it is now; what cannot be done has a status."""
    try:
        form = watched.form(modules)
    except (MemoryError, RuntimeError) as problem:
        said = (str(problem) or type(problem).__name__).splitlines()[0]
        return Spectrum(watched.name, (), "too_large" if out_of_memory(problem) else "failed", reason=said)
    delta = WeightDelta(watched.name, form.shape, None, form.max_rank, note=watched.note)
    where = Wanted(wanted.top, wanted.only_top, device_named(str(form.tensors[0].device)))
    return solve_forms([delta], [form], where)[0]


def _logged(rows: Sequence[Row]) -> dict[str, float]:
    """The medians by role as flat numbers, and how many matrices have none where there are any."""
    numbers: dict[str, Any] = {
        f"spectra/{line['role']}/{name}": line[name]
        for line in by_role(rows)
        for name in LOGGED
        if line[name] is not None and math.isfinite(line[name])
    }
    undone = sum(line["status"] not in ("ok", "unchanged") for line in rows)
    return numbers | ({"spectra/not_measured": float(undone)} if undone else {})
