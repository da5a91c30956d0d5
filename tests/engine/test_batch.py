"""The device path, run on the CPU: same numbers as one by one, memory that runs out, members that fail."""

from __future__ import annotations

import pytest
import torch
from spectra_kinds import KINDS, matrix_of

from spectra.engine import batch as batch_module
from spectra.engine import dense
from spectra.engine.batch import decompose_batches
from spectra.engine.plan import batches, plan
from spectra.engine.solve import solve
from spectra.types import WeightDelta


def _run(deltas, top=0, only_top=False, most=64):
    groups = batches(deltas, plan(deltas, 2**30), most)
    return dict(decompose_batches(deltas, groups, top=top, only_top=only_top, device="cpu"))


def _mixed():
    deltas = [WeightDelta.from_tensor(kind, matrix_of(kind, 24, 30)) for kind in KINDS]
    deltas += [
        WeightDelta.from_factors(f"f{i}", matrix_of("power", 24, 3, i), matrix_of("power", 3, 30, i)) for i in range(3)
    ]
    deltas += [WeightDelta.refused("r", (3, 3), "unsupported", "why")]
    return deltas


@pytest.mark.parametrize(("top", "only_top"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("most", [64, 3])
def test_equals_one_by_one(top, only_top, most):
    deltas = _mixed()
    found = _run(deltas, top, only_top, most)
    assert sorted(found) == list(range(len(deltas)))
    for i, delta in enumerate(deltas):
        alone = solve(delta, top=top or None, only_top=only_top)
        assert (found[i].name, found[i].status, found[i].k) == (alone.name, alone.status, alone.k)
        assert found[i].method == alone.method
        assert pytest.approx(alone.S, abs=1e-7 * max(alone.S, default=0)) == found[i].S


def test_memory_that_runs_out_halves_the_batch_and_says_so(monkeypatch):
    right = dense.gram_values

    def small(matrix):
        if len(matrix) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(matrix)

    monkeypatch.setattr(dense, "gram_values", small)
    deltas = [WeightDelta.from_tensor(str(i), matrix_of("gaussian", 10, 8, i)) for i in range(6)]
    found = _run(deltas)
    assert {spectrum.status for spectrum in found.values()} == {"ok"}
    assert "batch of 6 halved for want of memory; then gram-eigvals-f64" in found[0].method


def test_one_that_does_not_fit_alone_is_too_large(monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dense, "gram_values", never)
    monkeypatch.setattr(dense, "svd_values", never)
    found = _run([WeightDelta.from_tensor("a", matrix_of("gaussian", 10, 8))])
    assert found[0].status == "too_large"


def test_a_failed_check_sends_only_that_matrix_down_the_ladder(monkeypatch):
    right = dense.gram_values

    def lying(matrix):
        values = right(matrix)
        if matrix.dim() == 3:
            values[1] *= 1.1
        return values

    monkeypatch.setattr(dense, "gram_values", lying)
    found = _run([WeightDelta.from_tensor(str(i), matrix_of("gaussian", 10, 8, i)) for i in range(3)])
    assert found[0].method == found[2].method == "gram-eigvals-f64"
    assert found[1].method.startswith("gram-eigvals-f64 rejected")
    assert found[1].method.endswith("svd-f64")


def test_a_batch_that_fails_to_converge_is_done_one_by_one(monkeypatch):
    right = dense.gram_values

    def picky(matrix):
        if len(matrix) > 1:
            raise torch.linalg.LinAlgError("item 1 did not converge")
        return right(matrix)

    monkeypatch.setattr(dense, "gram_values", picky)
    found = _run([WeightDelta.from_tensor(str(i), matrix_of("gaussian", 10, 8, i)) for i in range(3)])
    assert {spectrum.status for spectrum in found.values()} == {"ok"}


def test_the_next_batch_is_read_while_one_computes(monkeypatch):
    events = []
    read, solve_batch = batch_module.read_batch, batch_module.solve_batch
    monkeypatch.setattr(
        batch_module, "read_batch", lambda members, device: events.append("read") or read(members, device)
    )
    monkeypatch.setattr(batch_module, "solve_batch", lambda *a, **k: (events.append("solve"), solve_batch(*a, **k))[1])
    _run([WeightDelta.from_tensor(str(i), matrix_of("gaussian", 10, 8, i)) for i in range(3)], most=1)
    assert events.count("read") == events.count("solve") == 3
    assert events.index("solve") >= 1
    assert events[:3].count("read") == 2
