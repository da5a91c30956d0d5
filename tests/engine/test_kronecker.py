"""The SVD of a Kronecker product against that of the product itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Kronecker
from spectra.engine.solve import Wanted, solve_forms
from spectra.engine.solvers.kronecker import kronecker_svd

sides = st.tuples(*[st.integers(1, 5)] * 4, st.integers(0, 10**6))


def pair(m1, n1, m2, n2, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m1, n1), (m2, n2)))


@given(sides)
def test_values_and_vectors_are_those_of_the_product(case):
    A, B = pair(*case)
    whole = torch.kron(A, B)
    S, U, Vh = kronecker_svd(A, B, top=100)
    expected = torch.linalg.svdvals(whole)
    assert torch.allclose(S, expected[: len(S)], atol=1e-12 * float(expected[0]))
    assert float(expected[len(S) :].sum()) <= 1e-12 * float(expected[0])
    assert torch.equal(kronecker_svd(A, B)[0].round(decimals=9), S.round(decimals=9))
    assert torch.allclose(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64), atol=1e-12)
    assert torch.allclose((U * S) @ Vh, whole, atol=1e-12 * float(expected[0]))


def test_the_engine_checks_and_reports_it_like_any_other():
    A, B = pair(6, 4, 5, 7, 0)
    whole = torch.kron(A, B)
    delta = WeightDelta.from_tensor("w", whole)
    (found,) = solve_forms([delta], [Kronecker(A, B)], Wanted(top=4))
    dense = next(iter(spectra.decompose([delta], top=4)))
    assert found.status == "ok"
    assert found.method == "kronecker-svd-f64"
    assert found.norm == pytest.approx(dense.norm, rel=1e-12)
    assert found.S[:20] == pytest.approx(dense.S[:20], abs=1e-7 * dense.S[0])
    assert spectra.subspace_similarity(found, dense, top=4).phi == pytest.approx(1, abs=1e-9)
    bad = Kronecker(A * float("nan"), B)
    assert solve_forms([delta], [bad], Wanted())[0].status == "nonfinite"
