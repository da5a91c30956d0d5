"""Faults that were reported of solvers on cards, each made to happen: no number comes of any of them."""

from __future__ import annotations

import math

import pytest
import torch
from support.card import card_of
from support.spectra_kinds import matrix_of, oracle

import spectra
from spectra.deltas import forms
from spectra.deltas.delta import WeightDelta
from spectra.engine import check, schedule
from spectra.engine.costs import needed
from spectra.engine.schedule import batches, plan
from spectra.engine.solvers import dense, factored, topk
from spectra.errors import DeviceError

A = matrix_of("gaussian", 30, 20)


def _dense(count, rows=24, columns=30):
    return [WeightDelta.from_tensor(f"d{i}", matrix_of("gaussian", rows, columns, i)) for i in range(count)]


def _factored(count, width=3):
    pairs = [(matrix_of("power", 24, width, i), matrix_of("power", width, 30, i)) for i in range(count)]
    return [WeightDelta.from_factors(f"f{i}", left, right) for i, (left, right) in enumerate(pairs)]


def _on_card(deltas, card, **options):
    """The results in the deltas' order, after everything that a card holds against the run."""
    found = {spectrum.name: spectrum for spectrum in spectra.decompose(deltas, device="cuda", **options)}
    assert card.misuses == []
    assert card.used == 0
    return [found[delta.name] for delta in deltas]


def _raising(*_, **__):
    raise topk.NotConvergedError("not this one")


def _fault(monkeypatch, name, wrong, deltas, top=None):
    with card_of(monkeypatch, faults={name: wrong}) as card:
        return _on_card(deltas, card, top=top), card


def test_a_solver_that_swallows_nan(monkeypatch):
    """pytorch issue 187759: svdvals of a matrix with NaN gives finite values."""
    handed = []

    def swallowing(right, matrix, *rest, **options):
        handed.append(bool(matrix.isfinite().all()))
        return right(matrix.nan_to_num(1.0), *rest, **options)

    bad = A.clone()
    bad[3, 4] = math.nan
    L, R = A[:, :4].clone(), A[:4].clone()
    L[0, 0] = math.nan
    deltas = [WeightDelta.from_tensor("dense", bad), WeightDelta.from_factors("factors", L, R)]
    monkeypatch.setattr(dense, "gram_values", _raising)
    found, _ = _fault(monkeypatch, "linalg_svdvals", swallowing, [*deltas, *_dense(1)])
    assert [spectrum.status for spectrum in found] == ["nonfinite", "nonfinite", "ok"]
    assert [spectrum.S is None or len(spectrum.S) == 0 for spectrum in found] == [True, True, False]
    assert handed == [True]  # NaN never gets as far


def test_nan_that_arises_on_the_way_and_is_swallowed(monkeypatch):
    def broken(right, factor, *rest, **options):
        packed, tau = right(factor, *rest, **options)
        packed[..., 0, 0] = math.nan
        return packed, tau

    def swallowing(right, matrix, *rest, **options):
        return right(matrix.nan_to_num(1.0), *rest, **options)

    monkeypatch.setattr(factored, "cholesky", _raising)
    with card_of(monkeypatch, faults={"geqrf": broken, "linalg_svdvals": swallowing}) as card:
        (found,) = _on_card(_factored(1), card)
    assert "qr-core-svd-f64 rejected (Σσ² = " in found.method
    assert found.status in ("ok", "failed")
    if found.status == "ok":
        S = oracle(_factored(1)[0].read().to_dense())[1].numpy()[:3]
        assert pytest.approx(S) == found.S


@pytest.mark.parametrize("calls", [1, 2])
def test_eigenvectors_that_are_not_orthonormal(monkeypatch, calls):
    """pytorch issue 192483: right at first, then wrong without a word."""
    seen = []

    def drifting(right, matrix, *rest, **options):
        values, vectors = right(matrix, *rest, **options)
        seen.append(1)
        if len(seen) >= calls:
            vectors[..., :, -1] = vectors[..., :, -2] + 0.3 * vectors[..., :, -1]
        return values, vectors

    deltas = [*_dense(2), *_dense(2, 20, 20)]
    for place, delta in enumerate(deltas):
        object.__setattr__(delta, "name", f"w{place}")
    found, _ = _fault(monkeypatch, "linalg_eigh", drifting, deltas, top=1)
    wrong = [spectrum for spectrum in found if "rejected" in spectrum.method]
    assert len(wrong) == (4 if calls == 1 else 2)
    for delta, spectrum in zip(deltas, found, strict=True):
        U, S, _ = oracle(delta.read().to_dense())
        assert abs(float(U[:, 0] @ torch.from_numpy(spectrum.U[:, 0]))) == pytest.approx(1)
        assert pytest.approx(S.numpy(), abs=1e-7 * float(S[0])) == spectrum.S


def test_vectors_lifted_from_a_skewed_basis_are_held_against_the_matrix():
    """An orthonormal basis of the wrong space has no skew left, and a residual."""
    S, U, Vh = dense.lift(A, torch.linalg.qr(matrix_of("gaussian", 20, 2)).Q)
    assert "residual" in check.vector_fault(forms.Dense(A), oracle(A)[1], U, Vh, 0.0)
    assert len(S) == 2


def test_a_batch_stays_below_what_solvers_count_in_32_bits(monkeypatch):
    """pytorch issue 102963: a size that overflows."""
    monkeypatch.setattr(schedule, "_MOST_ENTRIES", 3 * 24 * 30 + 1)

    def overflowing(right, matrix, *rest, **options):
        if matrix.numel() > 3 * 24 * 24:
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE")
        return right(matrix, *rest, **options)

    deltas = _dense(8)
    found, card = _fault(monkeypatch, "linalg_eigvalsh", overflowing, deltas)
    assert {spectrum.method for spectrum in found} == {"gram-eigvals-f64"}
    assert [shape[0] for _, _, shape in card.solved if len(shape) == 3] == [3, 3, 2]
    assert [len(batch.tasks) for batch in batches(deltas, plan(deltas, 2**30))] == [3, 3, 2]


def test_a_solver_that_refuses_a_size_hands_over_and_is_named(monkeypatch):
    def refusing(*_, **__):
        raise RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling gesvdj_bufferSize")

    (found,), _ = _fault(monkeypatch, "linalg_eigvalsh", refusing, _dense(1))
    assert found.method.startswith("gram-eigvals-f64 gave up (cusolver error: CUSOLVER_STATUS_INVALID_VALUE")
    assert found.method.endswith("; then svd-f64")


def test_a_card_that_dies_gives_no_number_and_says_what_to_do(monkeypatch):
    """pytorch issue 105359: after a crash inside a solver the card answers nothing more."""

    def crashing(right, *_, **__):
        card.dead = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(card.dead)

    deltas = [*_factored(2), *_dense(4)]
    for budget in (2**30, needed(deltas[-1], None)):
        with card_of(monkeypatch, faults={"linalg_eigvalsh": crashing}) as card:
            found = {s.name: s for s in spectra.decompose(deltas, device="cuda", memory_budget=budget)}
            with pytest.raises(DeviceError, match="cuda does not answer: CUDA error: an illegal memory access"):
                list(spectra.decompose(deltas, device="cuda", memory_budget=budget))
        assert sorted(found) == sorted(delta.name for delta in deltas)
        lost = [found[f"d{i}"] for i in range(4)]
        assert {spectrum.status for spectrum in lost} == {"failed"}
        for spectrum in lost:
            assert spectrum.S is None or not len(spectrum.S)
            assert spectrum.reason == (
                "cuda failed and answers nothing more here: CUDA error: an illegal memory access was encountered; "
                "run again, or with device=cpu (--device)"
            )
