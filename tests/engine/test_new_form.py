"""A new form of ΔW is one class, one ladder entry and one cost: the whole engine then takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Form
from spectra.engine import costs, ladder
from spectra.engine.costs import COSTS, Cost
from spectra.engine.ladder import LADDERS, Rung, Solver
from spectra.engine.schedule import batches, plan
from spectra.engine.solve import Wanted, solve_forms


@dataclass(frozen=True, eq=False)
class Diagonal(Form):
    """ΔW = diag(entries)."""

    entries: Tensor
    base_norm: float | None = None
    base_inner: float | None = None

    @property
    def tensors(self):
        return (self.entries,)

    @property
    def shape(self):
        return (len(self.entries), len(self.entries))

    @property
    def norm(self):
        return float(self.entries.norm())

    def times(self, block):
        return self.entries[:, None] * block

    @property
    def T(self):  # noqa: N802
        return self

    def take(self, rows):
        return Dense(self.to_dense()[rows], self.base_norm)

    def inner(self, matrix: Tensor) -> float:
        return float((self.entries * matrix.diagonal()).sum())

    def scaled(self, factor):
        return replace(self, entries=factor * self.entries)

    def to_dense(self):
        return torch.diag(self.entries)


@dataclass(frozen=True, eq=False)
class DiagonalInMemory:
    entries: Tensor
    factored = True
    refs = ()
    form = Diagonal

    def read(self, device="cpu"):
        return Diagonal(self.entries.to(device))


def _sorted_entries(forms, top):
    for form in forms:
        S, order = form.entries.abs().sort(descending=True)
        eye = torch.eye(len(S), dtype=S.dtype)[order[:top]]
        yield (S, (eye * form.entries[order[:top], None].sign()).T, eye) if top else (S, None, None)


@pytest.fixture
def _known(monkeypatch):
    rung = Rung("sorted-entries", 1e-15)
    entry = lambda form, top, only_top: [Solver(rung, lambda forms: _sorted_entries(forms, top))]  # noqa: E731
    monkeypatch.setattr(ladder, "LADDERS", {**LADDERS, Diagonal: entry})
    monkeypatch.setattr(costs, "COSTS", {**COSTS, Diagonal: lambda delta, top: Cost(1.0, 8 * delta.shape[0])})


def _delta(*entries):
    tensor = torch.tensor(entries).double()
    return WeightDelta("a.weight", (len(entries), len(entries)), DiagonalInMemory(tensor), len(entries))


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("top", [None, 2])
def test_it_is_planned_solved_and_checked(top):
    (found,) = spectra.decompose([_delta(-3.0, 1.0, 5.0)], top=top, device="cpu", memory_budget=100)
    assert (found.status, found.method, found.S.tolist()) == ("ok", "sorted-entries", [5.0, 3.0, 1.0])
    assert found.norm == pytest.approx(35**0.5)
    if top:
        assert (found.U * found.S[:2]) @ found.Vh == pytest.approx(torch.diag(torch.tensor([-3.0, 0.0, 5.0])).numpy())


@pytest.mark.usefixtures("_known")
def test_it_gets_a_status_like_any_other():
    deltas = [_delta(float("nan"), 1.0), _delta(0.0, 0.0), _delta(2.0, 1.0)]
    forms = [delta.read() for delta in deltas]
    assert [s.status for s in solve_forms(deltas, forms, Wanted())] == ["nonfinite", "unchanged", "ok"]


@pytest.mark.usefixtures("_known")
def test_it_never_shares_a_batch_with_another_form():
    deltas = [_delta(2.0, 1.0), WeightDelta.from_tensor("b.weight", torch.eye(2)), _delta(3.0, 1.0)]
    groups = batches(deltas, plan(deltas, 2**20))
    assert sorted([task.index for task in group.tasks] for group in groups) == [[0, 2], [1]]


def test_every_form_has_a_ladder_and_a_cost():
    ours = {form for form in Form.__subclasses__() if form.__module__.startswith("spectra.")}
    assert set(LADDERS) == set(COSTS) == ours
