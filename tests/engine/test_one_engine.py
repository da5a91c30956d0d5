"""One engine for a CPU and a card: batches of one are never stacked, and only what fits together is solved as one."""

from __future__ import annotations

import pytest
import torch
from support.spectra_kinds import matrix_of

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Kronecker, LowRank
from spectra.engine import ladder
from spectra.engine.solve import Wanted, solve, solve_forms
from spectra.engine.solvers import dense, topk


def _dense(name, seed=0, shape=(12, 9)):
    return WeightDelta.from_tensor(name, matrix_of("gaussian", *shape, seed))


def _factored(name, width, seed=0):
    return WeightDelta.from_factors(name, matrix_of("gaussian", 12, width, seed), matrix_of("gaussian", width, 9, seed))


def _together(deltas, top=0):
    return solve_forms(deltas, [delta.read() for delta in deltas], Wanted(top, together=True))


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("make", [_dense, lambda name: _factored(name, 3), lambda name: _factored(name, 11)])
def test_a_batch_of_one_has_the_bits_of_one_alone(make, top):
    delta = make("a")
    (found,) = _together([delta], top or 0)
    alone = solve(delta, top=top)
    assert found.method == alone.method
    assert (found.S == alone.S).all()
    for side in ("U", "Vh"):
        mine, its = getattr(found, side), getattr(alone, side)
        assert (mine == its).all() if top else mine is its is None


def test_only_equal_shapes_are_stacked(monkeypatch):
    """A plan groups by shape and rank; factors of other widths, or other forms, may still come along."""
    shapes = []
    stack = torch.stack

    def stacking(tensors, *where):
        if tensors[0].dim() == 2:  # not the counts of a matrix' entries
            shapes.append(len(tensors))
        return stack(tensors, *where)

    monkeypatch.setattr(ladder.torch, "stack", stacking)
    deltas = [_factored("a", 10), _dense("b"), _factored("c", 11), _factored("d", 10), _dense("e", 1)]
    found = _together(deltas)
    assert [spectrum.name for spectrum in found] == list("abcde")
    assert [spectrum.status for spectrum in found] == ["ok"] * 5
    assert shapes == [2, 2, 2, 2]  # two matrices that are looked at; two lefts, two rights, two matrices
    for spectrum, delta in zip(found, deltas, strict=True):
        assert pytest.approx(solve(delta).S, abs=1e-9) == spectrum.S


@pytest.mark.parametrize(("together", "status"), [(True, "ok"), (False, "too_large")])
def test_what_is_too_large_for_the_joint_solver_may_be_solved_otherwise_on_a_card(monkeypatch, together, status):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dense, "gram_values", never)
    delta = _dense("a")
    (found,) = solve_forms([delta], [delta.read()], Wanted(together=together))
    assert found.status == status
    if together:
        assert found.method == "gram-eigvals-f64 gave up (CUDA out of memory); then svd-f64"
    else:
        assert found.reason.startswith("memory ran out on cpu: CUDA out of memory")


def test_solvers_that_gain_from_a_batch_come_first_where_there_is_one(monkeypatch):
    monkeypatch.setattr(topk, "SMALLEST", 10)
    form = Dense(matrix_of("gaussian", 60, 60))

    def names(together):
        return [solver.rung.name for solver in ladder.ladder_for(form, 3, False, together=together)]

    assert names(False) == ["gram-lanczos-f64", "gram-eigh-f64", "svd-f64"]
    assert names(True) == ["gram-eigh-f64", "gram-lanczos-f64", "svd-f64"]


def test_a_matrix_whose_check_runs_out_of_memory_costs_no_other(monkeypatch):
    right = LowRank.times

    def greedy(form, block):
        if float(form.left[0, 0]) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(form, block)

    monkeypatch.setattr(LowRank, "times", greedy)
    deltas = [_factored("a", 3, 0), _factored("b", 3, 1)]
    forms = [delta.read() for delta in deltas]
    forms[0].left[0, 0] = 7
    found = solve_forms(deltas, forms, Wanted(2, together=True))
    assert [spectrum.status for spectrum in found] == ["too_large", "ok"]


def test_the_last_resort_of_a_product_keeps_no_more_values_than_its_rank():
    form = Kronecker(matrix_of("gaussian", 2, 6), matrix_of("gaussian", 6, 2))
    product = ladder.ladder_for(form, 0, False)[-1]
    ((S, U, Vh),) = product.run([form])
    assert (len(S), U, Vh) == (form.max_rank, None, None) == (4, None, None)
    assert torch.allclose(S, torch.linalg.svdvals(form.to_dense())[:4])
