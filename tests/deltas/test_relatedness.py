"""The cosine to the base against its slow definition, and what is said of weights that are not the base's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.deltas.forms import Dense, Kronecker, LowRank
from spectra.deltas.relatedness import (
    UNRELATED,
    cosine_to_base,
    is_unrelated,
    rearranged,
    unrelated_warning,
)

SEEDS = st.integers(0, 2**32 - 1)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_inner(a, b):
    return math.fsum(x * y for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))


def slow_cosine(delta, base):
    """The definition, in exact sums."""
    tuned = base + delta
    return slow_inner(tuned, base) / math.sqrt(slow_inner(tuned, tuned)) / math.sqrt(slow_inner(base, base))


def cosine(form, base):
    delta = form.to_dense()
    return cosine_to_base(float(base.norm()), float(delta.norm()), form.inner(base))


def form_of(kind, seed, size):
    if kind == "dense":
        return Dense(size * random(seed, 6, 8))
    if kind == "low rank":
        return LowRank(size * random(seed, 6, 2), random(seed + 1, 2, 8))
    return Kronecker(size * random(seed, 3, 2), random(seed + 1, 2, 4))


KINDS = st.sampled_from(["dense", "low rank", "kronecker"])


@given(KINDS, SEEDS, st.integers(-12, 12))
def test_the_inner_product_of_every_form(kind, seed, exponent):
    form, base = form_of(kind, seed, 10.0**exponent), random(seed + 2, 6, 8)
    expected = slow_inner(form.to_dense(), base)
    scale = float(form.to_dense().norm() * base.norm())
    assert abs(form.inner(base) - expected) <= 1e-14 * scale


@given(KINDS, SEEDS, st.integers(-14, 6), st.sampled_from([1e-140, 1.0, 1e140]))
def test_the_cosine_of_an_update_of_any_size(kind, seed, exponent, unit):
    form, base = form_of(kind, seed, unit * 10.0**exponent), unit * random(seed + 2, 6, 8)
    found = cosine(form, base)
    assert found == pytest.approx(slow_cosine(form.to_dense() / unit, base / unit), abs=1e-13)
    assert abs(found) <= 1


@given(SEEDS, st.floats(-8, 8).filter(lambda factor: abs(1 + factor) > 1e-3))
def test_an_update_along_the_base_gives_plus_or_minus_one(seed, factor):
    base = random(seed, 5, 7)
    assert cosine(Dense(factor * base), base) == pytest.approx(math.copysign(1, 1 + factor), abs=1e-9)


@given(SEEDS, st.integers(-3, 3))
def test_an_orthogonal_update_gives_one_over_the_root_of_one_plus_rho_squared(seed, exponent):
    base, delta = random(seed, 5, 7), random(seed + 1, 5, 7)
    delta -= base * float((delta * base).sum() / base.square().sum())
    delta *= 10.0**exponent * base.norm() / delta.norm()
    assert cosine(Dense(delta), base) == pytest.approx(1 / math.hypot(1, 10.0**exponent), rel=1e-9)


def test_no_direction_no_cosine():
    base = random(0, 4, 4)
    assert cosine(Dense(-base), base) is None
    assert cosine(Dense(-base * (1 + 1e-15)), base) is None
    assert cosine(Dense(base), torch.zeros_like(base)) is None
    assert cosine_to_base(1.0, math.inf, 0.0) is None
    assert cosine_to_base(1.0, math.nan, 0.0) is None


@pytest.mark.parametrize(
    ("value", "expected"), [(0.9, False), (UNRELATED, False), (0.49, True), (-1.0, True), (None, False)]
)
def test_the_threshold(value, expected):
    assert is_unrelated(value) is expected


def interleaved(base, heads):
    """Meta's order of rows from transformers': of each head first and second half become even and odd rows."""
    half = base.shape[0] // heads // 2
    rows = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in range(2)]
    return base[rows]


@settings(max_examples=20)
@given(SEEDS)
def test_what_was_done_to_the_weight_is_named(seed):
    base = random(seed, 16, 16)
    noise = 0.01 * random(seed + 1, 16, 16)
    assert "transposed" in rearranged(base.T + noise, base)
    assert "sign" in rearranged(noise - base, base)
    assert "rotary" in rearranged(interleaved(base, 2) + noise, base, heads=(2,))
    assert "rotary" in rearranged(base + noise, interleaved(base, 2), heads=(4, 2))
    assert rearranged(interleaved(base, 2) + noise, base) == ""
    assert rearranged(random(seed + 2, 16, 16), base, heads=(2, 4)) == ""


def test_another_order_of_rows_or_columns_is_named():
    base, order = random(0, 16, 8), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert rearranged(base[order], base) == "its rows are the base's in another order"
    assert rearranged(base[order].T, base.T) == "its columns are the base's in another order"
    assert rearranged(torch.zeros_like(base), base) == ""
    assert rearranged(base, torch.zeros_like(base)) == ""


def test_the_sentences():
    assert unrelated_warning({"a.weight": 0.01}, 9).startswith(
        "1 of 9 matrices is unrelated to the base (cosine under 0.5)"
    )
    assert "2 of 9 matrices are unrelated" in unrelated_warning({"a.weight": 0.0, "b.weight": 0.1}, 9, "it is this")
