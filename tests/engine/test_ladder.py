"""What happens when a solver fails, lies or runs out of memory: the next one, recorded; never an aborted run."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from support.spectra_kinds import matrix_of, oracle

from spectra import decompose
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense
from spectra.engine import check
from spectra.engine.decompose import decompose_indexed
from spectra.engine.solve import out_of_memory, solve
from spectra.engine.solvers import dense, factored

A = matrix_of("gaussian", 30, 20)


def _delta(name="a", matrix=A):
    return WeightDelta.from_tensor(name, matrix)


def _raising(problem):
    def run(*_arguments, **_options):
        raise problem

    return run


@pytest.mark.parametrize("top", [None, 3])
def test_a_solver_that_does_not_converge_hands_over(monkeypatch, top):
    problem = torch.linalg.LinAlgError("did not converge\nmore")
    monkeypatch.setattr(dense, "gram_values", _raising(problem))
    monkeypatch.setattr(dense, "gram_top", _raising(problem))
    spectrum = solve(_delta(), top=top)
    first = "gram-eigh-f64" if top else "gram-eigvals-f64"
    assert spectrum.method == f"{first} gave up (did not converge); then svd-f64"
    assert pytest.approx(oracle(A)[1].numpy()) == spectrum.S


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda S: S * 1.001, "is not ‖ΔW‖²"),
        (lambda S: S.flip(-1), "not descending"),
        (lambda S: -S.flip(-1), "negative"),
        (lambda S: S * float("nan"), "not finite"),
    ],
)
def test_wrong_values_are_rejected(monkeypatch, wrong, why):
    right = dense.gram_values
    monkeypatch.setattr(dense, "gram_values", lambda matrix: wrong(right(matrix)))
    spectrum = solve(_delta())
    assert spectrum.status == "ok"
    assert why in spectrum.method
    assert spectrum.method.endswith("; then svd-f64")


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize(("wrong", "why"), [(lambda W: W * 1.01, "orthonormal"), (lambda W: -W, "residual")])
def test_wrong_vectors_are_rejected(monkeypatch, side, wrong, why):
    right = dense.gram_top

    def lying(*arguments):
        found = list(right(*arguments))
        found[side] = wrong(found[side])
        return tuple(found)

    monkeypatch.setattr(dense, "gram_top", lying)
    spectrum = solve(_delta(), top=3)
    assert why in spectrum.method
    assert spectrum.method.endswith("; then svd-f64")


def test_vectors_that_belong_elsewhere_are_a_fault():
    S, U, Vh = dense.svd_top(A, 4)
    assert check.vector_fault(Dense(A), S, U, Vh, 0.0) == ""
    assert "residual" in check.vector_fault(Dense(A), S, U[:, [1, 0, 2, 3]], Vh, 0.0)
    assert "orthonormal" in check.vector_fault(Dense(A), S, U * float("nan"), Vh, 0.0)


def test_if_all_solvers_fail_the_reasons_are_told(monkeypatch):
    monkeypatch.setattr(dense, "gram_values", _raising(torch.linalg.LinAlgError("one")))
    monkeypatch.setattr(dense, "svd_values", _raising(torch.linalg.LinAlgError("two")))
    spectrum = solve(_delta())
    assert spectrum.status == "failed"
    assert "gram-eigvals-f64 gave up (one); svd-f64 gave up (two)" in spectrum.reason
    assert spectrum.norm == pytest.approx(float(A.norm()))


def test_factored_hands_over_to_the_product(monkeypatch):
    monkeypatch.setattr(factored, "factored_svd", _raising(torch.linalg.LinAlgError("no")))
    L, R = A[:, :4], A[:4]
    spectrum = solve(WeightDelta.from_factors("a", L, R), top=2)
    first, second = "cholesky-qr2-core-svd-f64 gave up (no)", "qr-core-svd-f64 gave up (no)"
    assert spectrum.method == f"{first}; then {second}; then product-svd-f64"
    assert pytest.approx(oracle(L @ R)[1][:4].numpy()) == spectrum.S


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_out_of_memory_is_a_status(monkeypatch, problem):
    assert out_of_memory(problem)
    monkeypatch.setattr(dense, "gram_values", _raising(problem))
    spectrum = solve(_delta())
    assert spectrum.status == "too_large"
    assert "memory ran out on cpu" in spectrum.reason


def test_a_recipe_that_breaks_is_a_status(monkeypatch):
    delta = _delta()
    monkeypatch.setattr(type(delta.recipe), "read", _raising(RuntimeError("broken tensor\nstack")))
    spectrum = solve(delta)
    assert (spectrum.status, spectrum.reason) == ("failed", "broken tensor")


def test_one_bad_matrix_leaves_the_others(monkeypatch):
    bad = A.clone()
    bad[2, 3] = float("nan")
    deltas = [
        _delta("nan", bad),
        _delta("zero", 0 * A),
        _delta("ok"),
        _delta("huge", 1e200 * A),
        _delta("tiny", 1e-200 * A),
    ]
    found = {spectrum.name: spectrum for spectrum in decompose(deltas)}
    assert {name: spectrum.status for name, spectrum in found.items()} == {
        "nan": "nonfinite", "zero": "unchanged", "ok": "ok", "huge": "ok", "tiny": "ok",
    }  # fmt: skip
    assert found["nan"].reason == "1 entries are NaN or infinite"


class _Dying(Executor):
    """An executor whose worker dies at the second task, and which then takes no more."""

    _max_workers = 1

    def __init__(self):
        self.taken = 0

    def submit(self, work, delta):

        self.taken += 1
        if self.taken > 2:
            raise BrokenProcessPool("a worker died")
        future = Future()
        if self.taken == 2:
            future.set_exception(BrokenProcessPool("a worker died"))
        else:
            future.set_result(work(delta))
        return future


def test_a_lost_worker_costs_its_matrix_and_no_other():
    found = dict(decompose_indexed([_delta(str(i)) for i in range(5)], executor=_Dying(), device="cpu"))
    assert sorted(found) == list(range(5))
    assert [found[i].status for i in range(5)] == ["ok", "failed", "ok", "ok", "ok"]
    assert "its worker was lost (BrokenProcessPool" in found[1].reason
    assert "solved by the driver" in found[4].method


def test_processes_give_what_threads_give():
    import multiprocessing

    deltas = [_delta(str(i), matrix_of("power", 12, 9, i)) for i in range(3)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        elsewhere = dict(decompose_indexed(deltas, top=2, executor=pool, device="cpu"))
    for i, here in decompose_indexed(deltas, top=2, device="cpu"):
        assert pytest.approx(here.S) == elsewhere[i].S


def test_errors_of_our_own_are_not_hidden():
    class Buggy(_Dying):
        def submit(self, work, delta):

            future = Future()
            future.set_exception(TypeError("a bug"))
            return future

    with pytest.raises(TypeError, match="a bug"):
        list(decompose_indexed([_delta()], executor=Buggy(), device="cpu"))
