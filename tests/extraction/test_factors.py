"""Factors: balanced, equal to the truncated ΔW, and with the error of their dtype stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.errors import SelectionError
from spectra.extraction.factors import balanced
from spectra.extraction.options import DTYPES
from spectra.spectrum import Spectrum


def some(scale=1.0):
    U, S, Vh = np.linalg.svd(scale * np.random.default_rng(0).standard_normal((12, 9)), full_matrices=False)
    return Spectrum("a", (12, 9), S=S, U=U, Vh=Vh)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rounding_is_what_was_stored_less_what_was_meant(dtype):
    spectrum = some()
    factors = balanced(spectrum, 4, dtype)
    meant = (spectrum.U[:, :4] * spectrum.S[:4]) @ spectrum.Vh[:4]
    measured = np.linalg.norm((factors.B.double() @ factors.A.double()).numpy() - meant)
    assert factors.B.dtype == factors.A.dtype == getattr(torch, dtype)
    assert factors.rounding == pytest.approx(measured, rel=1e-6, abs=1e-13)


def test_both_factors_have_the_same_norm_triplet_by_triplet():
    factors = balanced(some(), 5, "float64")
    assert torch.allclose(factors.B.norm(dim=0), factors.A.norm(dim=1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_wider_type_is_named_where_there_is_none(dtype):
    huge = Spectrum("a", (1, 1), S=[1e80], U=np.eye(1), Vh=np.eye(1))
    with pytest.raises(SelectionError, match=rf"overflow in {dtype}: no type .* leave the matrix out \(--layer\)"):
        balanced(huge, 1, dtype)


def test_factors_that_overflow_are_refused():
    with pytest.raises(SelectionError, match="overflow in float16: store them in bfloat16 or float32"):
        balanced(some(scale=1e12), 2, "float16")


def test_where_triplets_are_missing_the_factors_are_zero():
    few = Spectrum("a", (3, 2), S=[2.0, 0.0], U=np.eye(3)[:, :2], Vh=np.eye(2))
    factors = balanced(few, 2)
    assert factors.B[:, 1].abs().sum() == factors.A[1].abs().sum() == 0
    none = balanced(Spectrum("a", (3, 2), "unchanged", S=[0.0, 0.0]), 2)
    assert none.B.shape == (3, 2)
    assert not none.B.any()
