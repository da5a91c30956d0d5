"""Small matrices of one shape are read and solved together on the CPU: each has the numbers that it has alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch
from support.checkpoints import write_checkpoint

import spectra
from spectra.deltas import together
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import SMALL
from spectra.engine.decompose import decompose_indexed
from spectra.engine.schedule import bundles, plan
from spectra.engine.solve import solve, solve_together
from spectra.errors import SourceError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
SPOILT = ("zero", "nan", "huge", "tiny", "few directions")


def experts(folder, dtype, count=24, size=64, shards=1, spoil=()):
    """A base and tuned checkpoint of experts; some are what a batch should not suffer from."""
    torch.manual_seed(0)
    base = 0.02 * torch.randn(count, size, size, dtype=torch.float64)
    moves = 10.0 ** torch.linspace(-6, -2, count, dtype=torch.float64)[:, None, None]
    tuned = base + moves * torch.randn(count, size, size, dtype=torch.float64)
    base, tuned = base.to(dtype), tuned.to(dtype)
    for place, kind in enumerate(spoil):
        _spoil(kind, tuned[place], base[place])
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(count)]
    for side, stack in (("base", base), ("tuned", tuned)):
        write_checkpoint(folder / side, dict(zip(names, map(torch.clone, stack), strict=True)), shards=shards)
    return spectra.open_source(folder / "tuned", folder / "base").deltas


def _spoil(kind, tuned, base):
    if kind == "zero":
        tuned.copy_(base)
    elif kind == "nan":
        tuned[3, 4] = float("nan")
    elif kind == "huge":
        tuned[1, 2] = 1e300 if tuned.dtype == torch.float64 else torch.finfo(tuned.dtype).max
    elif kind == "tiny":
        base.copy_(torch.zeros_like(base))
        tuned.copy_(torch.finfo(tuned.dtype).tiny * torch.eye(*tuned.shape, dtype=tuned.dtype))
    else:
        tuned.copy_(base + 0.1 * torch.outer(*torch.randn(2, len(tuned))))


def assert_same_bits(found, alone):
    for field in fields(found):
        mine, its = getattr(found, field.name), getattr(alone, field.name)
        if isinstance(its, np.ndarray):
            assert np.array_equal(mine, its), field.name
        else:
            assert mine == its, field.name


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_of_a_batch_has_the_bits_that_it_has_alone(dtype, top, tmp_path):
    deltas = experts(tmp_path, DTYPES[dtype], spoil=SPOILT)
    found = solve_together(deltas, top=top)
    assert [spectrum.status for spectrum in found[:2]] == ["unchanged", "nonfinite"]
    assert {spectrum.status for spectrum in found[2:]} == {"ok"}
    for spectrum, delta in zip(found, deltas, strict=True):
        assert_same_bits(spectrum, solve(delta, top=top))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (7, 40), (100, 1), (90, 130)])
def test_the_values_are_those_of_a_float64_svd(dtype, shape):
    torch.manual_seed(1)
    matrices = torch.randn(20, *shape).to(DTYPES[dtype])
    found = solve_together([WeightDelta.from_tensor(str(i), matrix) for i, matrix in enumerate(matrices)])
    for spectrum, matrix in zip(found, matrices.double(), strict=True):
        S = torch.linalg.svdvals(matrix).numpy()
        assert np.abs(spectrum.S - S).max() <= spectrum.resolution
        assert spectrum.norm == pytest.approx(float(np.sqrt(np.square(S).sum())), rel=1e-12)
        assert spectrum.moved[0] == float((matrix != 0).double().mean())


@pytest.mark.parametrize("shards", [1, 3])
def test_workers_and_neighbours_change_no_bit(shards, tmp_path):
    deltas = experts(tmp_path, torch.bfloat16, shards=shards)
    alone = [solve(delta) for delta in deltas]
    runs = [dict(decompose_indexed(deltas, device="cpu", threads=1)), dict(decompose_indexed(deltas[:1] + deltas[5:]))]
    for workers in (1, 3):
        with ThreadPoolExecutor(workers) as pool:
            runs.append(dict(decompose_indexed(deltas, device="cpu", executor=pool)))
    for run, places in zip(runs, [range(24), [0, *range(5, 24)], range(24), range(24)], strict=True):
        for place, spectrum in zip(places, (run[i] for i in sorted(run)), strict=True):
            assert_same_bits(spectrum, alone[place])


def test_one_that_cannot_be_read_costs_no_other(tmp_path):
    deltas = experts(tmp_path, torch.float32, shards=3)
    whole = [solve(delta) for delta in deltas]
    lost = deltas[4].recipe.tuned.path
    with open(lost, "r+b") as file:
        file.truncate(200)
    for delta, spectrum, before in zip(deltas, solve_together(deltas), whole, strict=True):
        if delta.recipe.tuned.path == lost:
            assert spectrum.status == "unreadable"
            assert "changed after it was opened" in spectrum.reason
        else:
            assert_same_bits(spectrum, before)


def test_where_reading_together_fails_each_is_read_alone(tmp_path, monkeypatch):
    deltas = experts(tmp_path, torch.float32)

    def failing(*_):
        raise MemoryError

    monkeypatch.setattr(together, "differences", failing)
    assert {spectrum.status for spectrum in solve_together(deltas)} == {"ok"}

    def refusing(refs):
        raise SourceError("not now")

    monkeypatch.undo()
    monkeypatch.setattr("spectra.files.neighbours._read_run", lambda refs, run: refusing(refs))
    assert {spectrum.status for spectrum in solve_together(deltas)} == {"ok"}


def test_a_solver_that_fails_for_one_is_not_left_by_the_others(monkeypatch):
    from spectra.engine.solvers import dense

    right = dense.gram_values

    def failing(matrix):
        if bool((matrix == 7.0).any()):
            raise RuntimeError("the iteration did not converge")
        return right(matrix)

    monkeypatch.setattr(dense, "gram_values", failing)
    matrices = torch.randn(6, 12, 12, generator=torch.Generator().manual_seed(0))
    matrices[2, 0, 0] = 7.0
    found = solve_together([WeightDelta.from_tensor(str(i), matrix) for i, matrix in enumerate(matrices)])
    assert [spectrum.method.startswith("gram-eigvals-f64 gave up") for spectrum in found] == [i == 2 for i in range(6)]
    assert {spectrum.status for spectrum in found} == {"ok"}


def _deltas(*sizes):
    return [WeightDelta.from_tensor(str(i), torch.eye(size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("budget", [2**20, 2**33])
def test_bundles_fit_the_budget_and_leave_no_worker_idle(workers, budget):
    deltas = _deltas(*[64] * 100, *[30] * 50, 300, 300)
    schedule = plan(deltas, budget)
    made = bundles(deltas, schedule, workers)
    assert [task for bundle in made for task in bundle.tasks] == list(schedule.tasks)
    for bundle in made:
        assert len({deltas[task.index].shape for task in bundle.tasks}) == 1
        if len(bundle.tasks) > 1:
            assert bundle.bytes * workers <= budget
            assert sum(task.entries for task in bundle.tasks) <= 8 * SMALL
    assert len([bundle for bundle in made if deltas[bundle.tasks[0].index].shape == (64, 64)]) >= min(4 * workers, 25)
    assert all(len(bundle.tasks) == 1 for bundle in made if deltas[bundle.tasks[0].index].shape == (300, 300))
