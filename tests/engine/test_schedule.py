"""The plan, without a device and without reading a tensor."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectra import decompose
from spectra.deltas.delta import WeightDelta
from spectra.engine.accounts import probe
from spectra.engine.costs import dense_flops, flops, needed
from spectra.engine.memory import readable_size
from spectra.engine.schedule import Plan, Task, batches, plan, side_by_side
from spectra.engine.solve import solve

GIB = 2**30


def _deltas(*shapes):
    return [WeightDelta.from_tensor(str(i), torch.zeros(shape)) for i, shape in enumerate(shapes)]


def test_longest_first_and_ties_in_input_order():
    schedule = plan(_deltas((4, 4), (9, 9), (4, 4), (2, 30)), GIB)
    assert [task.index for task in schedule.tasks] == [1, 2, 0, 3] or [t.index for t in schedule.tasks] == [1, 0, 2, 3]
    work = [task.flops for task in schedule.tasks]
    assert work == sorted(work, reverse=True)


def test_above_the_budget_is_named_with_what_it_needs():
    deltas = _deltas((300, 300), (3, 3))
    found = {spectrum.name: spectrum for spectrum in decompose(deltas, memory_budget="100KB", device="cpu")}
    assert found["0"].status == "too_large"
    assert found["0"].reason.startswith(f"needs {readable_size(needed(deltas[0], None))}, the budget is 97.7 KiB")
    assert found["1"].status == "unchanged"


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=12), st.integers(1, 30_000))
def test_batches_hold_every_task_once_and_keep_to_the_budget(shapes, budget):
    deltas = _deltas(*shapes)
    schedule = plan(deltas, budget)
    groups = batches(deltas, schedule, most=3)
    indices = [task.index for batch in groups for task in batch.tasks]
    assert sorted(indices) == sorted(task.index for task in schedule.tasks)
    for batch in groups:
        assert len({deltas[task.index].shape for task in batch.tasks}) == 1
        assert len(batch.tasks) <= 3
        assert batch.bytes <= max(budget / 2, batch.tasks[0].bytes)
    for before, batch in pairwise(groups):
        assert batch.ahead == (before.bytes + batch.bytes <= budget)


@pytest.mark.parametrize(("budget", "cores", "expected"), [(1000, 2, 2), (1000, 9, 3), (250, 9, 2), (50, 9, 1)])
def test_side_by_side_keeps_to_cores_matrices_and_bytes(budget, cores, expected):
    assert side_by_side(Plan(tuple(Task(i, 1.0, 100) for i in range(3)), {}, budget), cores) == expected


def test_more_work_costs_more():
    small, large = _deltas((30, 40), (300, 400))
    assert flops(small, None) < flops(large, None) < flops(large, 5)
    assert needed(small, None) < needed(large, None)
    refused = WeightDelta.refused("a", (3, 3), "unsupported", "no")
    assert (flops(refused, None), needed(refused, None)) == (0, 0)


@pytest.mark.parametrize("module", ["schedule", "costs", "memory"])
def test_the_plan_needs_no_torch(module):
    code = f"import sys, spectra.engine.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_reading_needs_for_a_while_counts():
    """A recipe that decomposes its base while it is read says so, and the larger of both phases is the estimate."""
    plain = WeightDelta.from_tensor("a", torch.zeros(64, 64))

    class Greedy(type(plain.recipe)):
        reading_bytes = 10**9

    greedy = replace(plain, recipe=Greedy(**vars(plain.recipe)))
    assert needed(greedy, None) >= 10**9 > needed(plain, None)
    modest = replace(plain, recipe=type("Modest", (type(plain.recipe),), {"reading_bytes": 8})(**vars(plain.recipe)))
    assert needed(modest, None) == needed(plain, None)


def test_vectors_cost_what_is_spent_on_them():
    s = 2048
    none, few, many, every = (dense_flops((s, s), top) for top in (None, 30, 100, s))
    # CPU seconds, measured: 0.8, 1.5, 2.9 and 3.0
    assert 1.5 < few / none < 2.1
    assert few < many < every == pytest.approx(9 * s**3)
    small, large = (dense_flops((n, n), 30) / dense_flops((n, n), None) for n in (s, 4 * s))
    assert large < small, "a few vectors cost an ever smaller part of a large matrix"


@pytest.mark.parametrize(("top", "only_top"), [(None, False), (30, False), (30, True)])
def test_the_pace_is_measured_by_what_no_rung_gives_up(top, only_top):
    assert "gave up" not in solve(probe(512), top=top, only_top=only_top).method
