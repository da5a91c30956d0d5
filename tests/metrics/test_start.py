"""The share of the start: its slow definition, its law under rotation, its chance level."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectra.errors import SelectionError
from spectra.metrics.start import span, start_share
from spectra.spectrum import Spectrum

seeds = st.integers(0, 10_000)


def spectrum_of(matrix, k=None):
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return Spectrum("w", matrix.shape, S=S, U=U[:, :k], Vh=Vh[:k])


def slowly(update, factor, top, side):
    """‖P·ΔW_k‖²/‖ΔW_k‖² with P the projector onto the factor's columns, everything formed."""
    U, S, Vh = np.linalg.svd(update, full_matrices=False)
    best = (U[:, :top] * S[:top]) @ Vh[:top]
    P = factor @ np.linalg.pinv(factor)
    inside = P @ best if side == "left" else best @ P
    return np.linalg.norm(inside) ** 2 / np.linalg.norm(best) ** 2


@given(seeds, st.sampled_from([(9, 12), (12, 9), (10, 10)]), st.integers(1, 9), st.integers(1, 4))
def test_it_is_its_definition_on_both_sides(seed, shape, top, width):
    rng = np.random.default_rng(seed)
    update = rng.standard_normal(shape)
    for side, size in zip(("left", "right"), shape, strict=True):
        factor = rng.standard_normal((size, width))
        found = start_share(spectrum_of(update, top), span(factor), top=top, side=side)
        assert found == pytest.approx(slowly(update, factor, top, side), rel=1e-10)


@given(seeds)
def test_any_basis_of_the_factors_gives_the_same(seed):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((12, 3))
    turned = A @ (rng.standard_normal((3, 3)) + 4 * np.eye(3))
    spectrum = spectrum_of(rng.standard_normal((12, 12)))
    assert start_share(spectrum, span(A), top=5) == pytest.approx(start_share(spectrum, span(turned), top=5), rel=1e-9)


def test_an_update_in_the_start_is_all_of_it_and_one_beside_it_is_none():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    inside = spectrum_of(Q[:, :2] @ rng.standard_normal((2, 15)))
    assert start_share(inside, Q[:, :4], top=10) == pytest.approx(1.0)
    assert start_share(inside, Q[:, 2:6], top=10) == pytest.approx(0.0, abs=1e-20)


def test_chance_is_what_random_starts_give():
    rng = np.random.default_rng(1)
    spectrum = spectrum_of(rng.standard_normal((40, 8)))
    draws = [start_share(spectrum, span(rng.standard_normal((40, 5))), top=3) for _ in range(400)]
    assert np.mean(draws) == pytest.approx(5 / 40, rel=0.05)


def test_a_span_leaves_out_what_is_rounding():
    a = np.random.default_rng(2).standard_normal((9, 2))
    assert span(np.hstack([a, a @ [[1.0], [3.0]]])).shape == (9, 2)
    assert span(np.zeros((9, 2))).shape == (9, 0)


def test_what_has_no_vectors_or_other_sizes_is_refused():
    with pytest.raises(SelectionError, match="no vectors"):
        start_share(Spectrum("w", (2, 2), S=[1.0, 0.0]), np.eye(2), top=1)
    with pytest.raises(SelectionError, match="3 entries on the left, the start 2"):
        start_share(spectrum_of(np.eye(3)), np.eye(2), top=1)


def test_what_rounding_left_does_not_count():
    """The start's own directions are those above the edge, so of the start itself all is left."""
    update = spectrum_of(np.diag([3.0, 2.0, 0.1, 0.1]))
    rounded = replace(update, noise_edge=0.5)
    assert start_share(rounded, update.U[:, :2], top=4) == 1.0
    assert start_share(update, update.U[:, :2], top=4) == pytest.approx(13 / 13.02)
    assert np.isnan(start_share(replace(update, noise_edge=5.0), update.U[:, :2], top=4))
