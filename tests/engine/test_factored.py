"""Factored updates against the SVD of the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra_kinds import matrix_of, oracle

from spectra.engine import check, dense, factored
from spectra.engine.solve import solve
from spectra.types import LowRank, WeightDelta


def _factors(rows, rank, columns, seed=0):
    return matrix_of("gaussian", rows, rank, seed), matrix_of("gaussian", rank, columns, seed + 1)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 30), st.integers(0, 9), st.integers(0, 6))
@settings(max_examples=80, deadline=None)
def test_equals_the_product(rows, rank, columns, seed, top):
    L, R = _factors(rows, rank, columns, seed)
    count = min(rows, rank, columns)
    S, U, Vh = factored.factored_svd(L, R, top)
    assert torch.allclose(S, oracle(L @ R)[1][:count], atol=1e-12 * float(L.norm() * R.norm()))
    if top:
        assert U.shape == (rows, min(top, count))
        assert check.vector_fault(LowRank(L, R), S, U, Vh, 1e-12 * float(S[0])) == ""
    else:
        assert U is None
        assert Vh is None


@given(st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_does_not_see_the_choice_of_factors(seed):
    L, R = _factors(20, 4, 15, seed)
    mix = matrix_of("gaussian", 4, 4, seed + 7) + 3 * torch.eye(4)
    mixed = factored.factored_svd(L @ mix, torch.linalg.solve(mix, R))[0]
    assert torch.allclose(mixed, factored.factored_svd(L, R)[0], rtol=1e-8)


@pytest.mark.parametrize("kind", ["rank deficient", "exponential", "one value", "clustered"])
def test_graded_and_deficient_factors(kind):
    L, R = matrix_of(kind, 50, 12), matrix_of(kind, 12, 40, 3)
    S, U, Vh = factored.factored_svd(L, R, 5)
    assert torch.allclose(S, oracle(L @ R)[1][:12], atol=1e-12 * float(L.norm() * R.norm()))
    assert check.vector_fault(LowRank(L, R), S, U, Vh, 1e-12 * float(S[0])) == ""


def test_reconstructs_the_product():
    L, R = _factors(30, 5, 20)
    S, U, Vh = factored.factored_svd(L, R, 5)
    assert torch.allclose((U * S) @ Vh, L @ R, atol=1e-12)


def test_a_batch_equals_its_members():
    pairs = [_factors(14, 3, 9, seed) for seed in range(4)]
    S, U, Vh = factored.factored_svd(torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]), 2)
    for i, (L, R) in enumerate(pairs):
        assert torch.allclose(S[i], factored.factored_svd(L, R)[0], rtol=1e-12)
        assert check.vector_fault(LowRank(L, R), S[i], U[i], Vh[i], 0.0) == ""


def test_norm_of_factors_that_cancel():
    L, R = _factors(600, 4, 30)
    left = torch.cat([L, -L], 1)
    right = torch.cat([R, R + 1e-9 * matrix_of("gaussian", 4, 30, 5)], 0)
    norm, magnitude = factored.factored_norm(left, right)
    assert norm == pytest.approx(float((left @ right).norm()), rel=1e-6)
    assert magnitude == pytest.approx(float(left.norm() * right.norm()))


def test_the_product_is_never_formed(monkeypatch):
    def formed(self):
        raise AssertionError("the product was formed")

    monkeypatch.setattr(LowRank, "to_dense", formed)
    monkeypatch.setattr(dense, "svd_top", formed)
    assert solve(WeightDelta.from_factors("a", *_factors(40, 3, 30)), top=2).status == "ok"
