"""Dense solvers against a float64 SVD, over kinds of spectra and shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spectra_kinds import KINDS, angle, matrix_of, oracle

from spectra.deltas.forms import Dense
from spectra.engine import check
from spectra.engine.solvers import calibration, dense

SHAPES = [(1, 1), (1, 7), (7, 1), (40, 40), (30, 90), (90, 30), (300, 280)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_values_equal_the_oracle(kind, shape):
    A = matrix_of(kind, *shape)
    expected = oracle(A)[1]
    top = float(expected[0])
    for values in (dense.gram_values(A), dense.svd_values(A), dense.gram_top(A, 3)[0]):
        assert values.shape == expected.shape
        assert (values - expected).abs().max() <= 1e-7 * top
        strong = expected > 1e-2 * top
        assert torch.allclose(values[strong], expected[strong], rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", [dense.gram_top, dense.svd_top])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero"])
def test_top_vectors_satisfy_their_equations(kind, shape, solver):
    A = matrix_of(kind, *shape)
    k = min(5, *shape)
    S, U, Vh = solver(A, 5)
    assert U.shape == (shape[0], k)
    assert Vh.shape == (k, shape[1])
    assert check.vector_fault(Dense(A), S, U, Vh, 1e-7 * float(S[0])) == ""
    assert check.value_fault(S, float(A.norm()), 0.0) == ""


@pytest.mark.parametrize("kind", ["power", "exponential", "gaussian", "bf16 merge"])
def test_top_subspace_is_the_oracles(kind):
    A = matrix_of(kind, 60, 80)
    u, s, vh = oracle(A)
    _, U, Vh = dense.gram_top(A, 4)
    bound = 1e-12 * float(s[0] ** 2 / (s[3] ** 2 - s[4] ** 2))
    assert angle(u[:, :4], U) <= bound
    assert angle(vh[:4].T, Vh.T) <= bound


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.floats(1e-40, 1e40))
@settings(max_examples=40, deadline=None)
def test_values_scale_and_do_not_see_a_transpose(rows, columns, seed, factor):
    A = matrix_of("gaussian", rows, columns, seed)
    values = dense.gram_values(A)
    assert torch.allclose(dense.gram_values(A.T), values, rtol=1e-7, atol=1e-7 * float(values[0]))
    assert torch.allclose(
        dense.gram_values(factor * A), factor * values, rtol=1e-6, atol=1e-7 * factor * float(values[0])
    )


@pytest.mark.parametrize("size", [1, 255, 256, 257, 511, 513, 700])
def test_halved_gram_is_the_product(size):
    A = matrix_of("gaussian", size, 20) if size < 20 else matrix_of("gaussian", size, size)
    product = A @ A.T
    assert torch.allclose(dense.gram(A), product, rtol=0, atol=1e-10)
    one_triangle = dense.gram(A, mirrored=False)
    assert torch.allclose(one_triangle.triu(), product.triu(), rtol=0, atol=1e-10)


def test_eigenvalues_never_read_the_lower_triangle():
    A = matrix_of("gaussian", 50, 50)
    product = A @ A.T
    spoiled = product.triu() + torch.full_like(product, float("nan")).tril(-1).nan_to_num(nan=1e300)
    assert torch.allclose(calibration.eigenvalues(spoiled), dense.eigenvalues(product), rtol=1e-10)


def test_a_batch_equals_its_members():
    batch = torch.stack([matrix_of(kind, 24, 31) for kind in ("gaussian", "power", "clustered")])
    S, U, Vh = dense.gram_top(batch, 3)
    for i, A in enumerate(batch):
        assert torch.allclose(S[i], dense.gram_values(A), atol=1e-9)
        assert check.vector_fault(Dense(A), S[i], U[i], Vh[i], 1e-7 * float(S[i, 0])) == ""
