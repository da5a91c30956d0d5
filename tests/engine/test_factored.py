"""Factored updates against the SVD of the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spectra_kinds import matrix_of, oracle

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import LowRank
from spectra.engine import check
from spectra.engine.solve import solve
from spectra.engine.solvers import dense, factored


def _factors(rows, rank, columns, seed=0):
    return matrix_of("gaussian", rows, rank, seed), matrix_of("gaussian", rank, columns, seed + 1)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 30), st.integers(0, 9), st.integers(0, 6))
@settings(max_examples=80, deadline=None)
def test_equals_the_product(rows, rank, columns, seed, top):
    L, R = _factors(rows, rank, columns, seed)
    count = min(rows, rank, columns)
    for grams in (None, LowRank(L, R).grams)[: 1 if rank > min(rows, columns) else 2]:
        S, U, Vh = factored.factored_svd(L, R, top, grams)
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


def _conditioned(rows, columns, condition, seed=0):
    """A factor whose singular values fall from 1 to 1/condition, rotated so that no column tells."""
    u, v = (torch.linalg.qr(matrix_of("gaussian", size, columns, seed + size)).Q for size in (rows, columns))
    return (u * condition ** -torch.linspace(0, 1, columns, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("stored", ["by rows", "by columns"])
@pytest.mark.parametrize("condition", [1.0, 10.0, 30.0, 1e2, 1e4, 1e6, 1e8, 1e12])
def test_cholesky_is_exact_or_refuses(stored, condition):
    factor = _conditioned(60, 7, condition)
    factor = factor if stored == "by rows" else factor.mT.contiguous().mT
    try:
        rotate, triangle = factored.cholesky(factor, factor.T @ factor)
    except factored.LowerRankError:
        assert condition >= 1e6
        return
    assert condition <= 1e8
    Q, eye = rotate(torch.eye(7).double()), torch.eye(7).double()
    assert torch.equal(triangle, triangle.triu())
    assert float((Q.T @ Q - eye).abs().max()) < 1e-14
    assert float((Q @ triangle - factor).abs().max()) < 1e-14


def test_columns_of_very_different_length_are_no_obstacle():
    scales = 10.0 ** -torch.arange(0, 70, 10).double()
    factor = matrix_of("gaussian", 60, 7) * scales
    rotate, triangle = factored.cholesky(factor, factor.T @ factor)
    assert torch.allclose(rotate(triangle) / scales, matrix_of("gaussian", 60, 7), rtol=0, atol=1e-13)


@pytest.mark.parametrize("top", [None, 3])
def test_factors_of_lower_rank_go_to_householder_and_that_is_said(top):
    L, R = _factors(30, 4, 20)
    L[:, 3] = L[:, 0] + L[:, 1]
    spectrum = solve(WeightDelta.from_factors("a", L, R), top=top)
    assert (
        spectrum.method == "cholesky-qr2-core-svd-f64 gave up (a factor is close to lower rank); then qr-core-svd-f64"
    )
    assert torch.allclose(torch.from_numpy(spectrum.S), oracle(L @ R)[1][:4], atol=1e-13 * float(spectrum.S[0]))
    full = solve(WeightDelta.from_factors("a", *_factors(30, 4, 20)), top=top)
    assert full.method == "cholesky-qr2-core-svd-f64"
    wide = solve(WeightDelta.from_factors("a", *_factors(30, 8, 6)), top=top)
    assert wide.method == "qr-core-svd-f64"


def test_reconstructs_the_product():
    L, R = _factors(30, 5, 20)
    S, U, Vh = factored.factored_svd(L, R, 5)
    assert torch.allclose((U * S) @ Vh, L @ R, atol=1e-12)


@pytest.mark.parametrize("by_cholesky", [False, True])
def test_a_batch_equals_its_members(by_cholesky):
    pairs = [_factors(14, 3, 9, seed) for seed in range(4)]
    lefts, rights = (torch.stack([pair[side] for pair in pairs]) for side in (0, 1))
    grams = (lefts.mT @ lefts, rights @ rights.mT) if by_cholesky else None
    S, U, Vh = factored.factored_svd(lefts, rights, 2, grams)
    for i, (L, R) in enumerate(pairs):
        assert torch.allclose(S[i], factored.factored_svd(L, R)[0], rtol=1e-12)
        assert check.vector_fault(LowRank(L, R), S[i], U[i], Vh[i], 0.0) == ""


def test_the_product_is_never_formed(monkeypatch):
    def formed(self):
        raise AssertionError("the product was formed")

    monkeypatch.setattr(LowRank, "to_dense", formed)
    monkeypatch.setattr(dense, "svd_top", formed)
    assert solve(WeightDelta.from_factors("a", *_factors(40, 3, 30)), top=2).status == "ok"
