"""Laws of every form of ΔW, against its dense twin."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.spectra_kinds import matrix_of

from spectra.deltas.forms import Dense, Form, Kronecker, LowRank


def _dense(m, n, seed):
    return Dense(matrix_of("gaussian", m, n, seed), 3.0, noise_edge=0.5, unchanged=0.25)


def _low_rank(m, n, seed):
    r = 1 + seed % 4
    return LowRank(matrix_of("gaussian", m, r, seed), matrix_of("gaussian", r, n, seed + 1), 3.0)


def _kronecker(m, n, seed):
    return Kronecker(matrix_of("gaussian", m, 2, seed), matrix_of("gaussian", 3, n, seed + 1), 3.0)


MAKERS = {Dense: _dense, LowRank: _low_rank, Kronecker: _kronecker}
cases = st.tuples(st.sampled_from(list(MAKERS)), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))


def _form(case):
    kind, m, n, seed = case
    return MAKERS[kind](m, n, seed)


def _close(found, expected):
    return torch.allclose(found, expected, rtol=0, atol=1e-12 * (1 + float(expected.abs().max())))


def test_every_form_has_its_laws_tested():
    assert set(MAKERS) == {form for form in Form.__subclasses__() if form.__module__.startswith("spectra.")}


@given(cases)
def test_shape_norm_and_rank_are_those_of_the_matrix(case):
    form = _form(case)
    matrix = form.to_dense()
    assert form.shape == tuple(matrix.shape)
    assert form.norm == pytest.approx(float(matrix.norm()), rel=1e-12)
    assert torch.linalg.matrix_rank(matrix) <= form.max_rank <= min(matrix.shape)
    assert not form.is_zero


@given(cases, st.integers(1, 3))
def test_products_with_a_block_are_those_of_the_matrix(case, width):
    form = _form(case)
    m, n = form.shape
    X, Y = matrix_of("gaussian", n, width, 7), matrix_of("gaussian", m, width, 8)
    assert _close(form.times(X), form.to_dense() @ X)
    assert _close(form.T.times(Y), form.to_dense().T @ Y)


@given(cases)
def test_the_transpose_is_a_form_of_the_same_kind(case):
    form = _form(case)
    assert type(form.T) is type(form)
    assert _close(form.T.to_dense(), form.to_dense().T)
    assert form.T.norm == pytest.approx(form.norm, rel=1e-12)
    assert (form.T.base_norm, form.T.noise_edge) == (form.base_norm, form.noise_edge)
    assert torch.equal(form.T.T.to_dense(), form.to_dense())


@given(cases, st.integers(0, 3), st.integers(1, 9))
def test_rows_are_rows_of_the_matrix_and_the_base_stays(case, start, count):
    form = _form(case)
    start = min(start, form.shape[0] - 1)
    assert _close(form.rows(start, start + count).to_dense(), form.to_dense()[start : start + count])
    numbers = torch.tensor([form.shape[0] - 1, 0])
    assert _close(form.take(numbers).to_dense(), form.to_dense()[numbers])
    assert form.take(numbers).base_norm == 3.0


@given(cases, st.floats(-4, 4).filter(lambda factor: abs(factor) > 1e-3))
def test_a_multiple_is_the_matrix_multiplied(case, factor):
    form = _form(case)
    found = form.scaled(factor)
    assert type(found) is type(form)
    assert _close(found.to_dense(), factor * form.to_dense())
    assert found.norm == pytest.approx(abs(factor) * form.norm, rel=1e-12)
    assert found.noise_edge == (None if form.noise_edge is None else abs(factor) * form.noise_edge)


@given(cases)
def test_what_the_base_says_can_be_learnt_later(case):
    form = _form(case)
    base = torch.linspace(-1, 2, math.prod(form.shape), dtype=torch.float64).reshape(form.shape)
    found = form.beside(base)
    assert form.base_cosine is None
    assert found.base_norm == pytest.approx(float(base.norm()), rel=1e-14)
    assert found.base_inner == pytest.approx(float((form.to_dense() * base).sum()), rel=1e-9, abs=1e-9)
    assert form.beside(base.T.contiguous().T).base_inner == pytest.approx(found.base_inner, rel=1e-12, abs=1e-12)
    assert all(a is b for a, b in zip(found.tensors, form.tensors, strict=True))


def test_squares_that_underflow_are_not_an_update_of_zero():
    tiny = Dense(torch.full((2, 2), 1e-200, dtype=torch.float64))
    assert tiny.norm == 0
    assert not tiny.is_zero
    assert Dense(torch.zeros(2, 2).double()).is_zero
    cancelled = LowRank(torch.tensor([[1.0, -1.0]]).double(), torch.ones(2, 3).double())
    assert cancelled.is_zero


def test_norm_of_factors_that_cancel():
    L, R = matrix_of("gaussian", 600, 4, 0), matrix_of("gaussian", 4, 30, 1)
    left = torch.cat([L, -L], 1)
    right = torch.cat([R, R + 1e-9 * matrix_of("gaussian", 4, 30, 5)], 0)
    form = LowRank(left, right)
    assert form.norm == pytest.approx(float((left @ right).norm()), rel=1e-6)
    assert form.magnitude == pytest.approx(float(left.norm() * right.norm()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_norm_is_not_finite_where_an_entry_is_not(kind, bad):
    form = MAKERS[kind](4, 5, 3)
    for place in range(len(form.tensors)):
        tensors = [tensor.clone() for tensor in form.tensors]
        tensors[place][0, 0] = bad
        assert not torch.tensor(kind(*tensors).norm).isfinite()


def test_the_product_is_formed_for_nothing_but_itself(monkeypatch):
    for kind in (LowRank, Kronecker):
        monkeypatch.setattr(kind, "to_dense", None)
        form = MAKERS[kind](5, 4, 2)
        form.T.times(form.times(torch.ones(form.shape[1], 1).double()))
        form.scaled(2.0).inner(torch.ones(form.shape).double())
        assert form.norm > 0


def test_forms_can_be_named_without_torch():
    code = "import sys, spectra.deltas.forms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
