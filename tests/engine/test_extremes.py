"""Every float64 update ends in a number that is right, or in a status that is true."""

from __future__ import annotations

import math

import pytest
import torch

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Kronecker, LowRank
from spectra.engine.extremes import within_range

ENTRIES = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXPONENTS = (1015, 700, 520, 400, 250, -250, -400, -520, -700, -1015)


def spectrum_of(delta, top=None):
    (found,) = spectra.decompose([delta], top=top)
    return found


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_values_scale_with_the_entries_by_any_power_of_two(exponent, top):
    power = 2.0**exponent
    for one, other in (
        (WeightDelta.from_tensor("a", ENTRIES), WeightDelta.from_tensor("a", ENTRIES * power)),
        (
            WeightDelta.from_factors("a", ENTRIES[:, :3].clone(), ENTRIES[:3].clone()),
            WeightDelta.from_factors("a", ENTRIES[:, :3] * power, ENTRIES[:3].clone()),
        ),
    ):
        plain, extreme = spectrum_of(one, top), spectrum_of(other, top)
        assert extreme.status == "ok", extreme.reason
        assert extreme.S / power == pytest.approx(plain.S, rel=1e-12)
        assert extreme.norm / power == pytest.approx(plain.norm, rel=1e-12)
        assert extreme.rank == plain.rank
        if top:
            assert abs((extreme.U * plain.U).sum(0)) == pytest.approx([1.0] * 3)
        usual, scaled = (spectra.summarize([item]).iloc[0] for item in (plain, extreme))
        for metric in spectra.METRICS:
            size = power if metric in ("norm", "sigma_1", "signal_norm") else 1.0
            assert scaled[metric] / size == pytest.approx(usual[metric], rel=1e-9, nan_ok=True), metric


def test_factors_of_opposite_extremes_are_no_extreme():
    found = spectrum_of(WeightDelta.from_factors("a", ENTRIES[:, :3] * 2.0**900, ENTRIES[:3] * 2.0**-900))
    assert pytest.approx(torch.linalg.svdvals(ENTRIES[:, :3] @ ENTRIES[:3])[:3].numpy(), rel=1e-12) == found.S


def test_what_underflows_is_neither_unchanged_nor_failed():
    tiny = 5e-324
    assert spectrum_of(WeightDelta.from_tensor("a", torch.eye(2, dtype=torch.float64) * tiny)).S.tolist() == [
        tiny,
        tiny,
    ]
    factors = WeightDelta.from_factors(
        "a", *(torch.full(size, 1e-100, dtype=torch.float64) for size in ((3, 1), (1, 2)))
    )
    assert pytest.approx([math.sqrt(6) * 1e-200]) == spectrum_of(factors).S
    assert spectrum_of(WeightDelta.from_tensor("a", torch.zeros(2, 2).double())).status == "unchanged"


def test_what_is_larger_than_float64_is_said():
    found = spectrum_of(WeightDelta.from_tensor("a", torch.full((3, 3), 1.7e308, dtype=torch.float64)), top=1)
    assert (found.status, found.norm, found.k) == ("nonfinite", None, 0)
    assert "larger than float64 holds" in found.reason
    bad = torch.full((3, 3), 1e300, dtype=torch.float64)
    bad[0, 0] = math.inf
    assert "1 entries are NaN or infinite" in spectrum_of(WeightDelta.from_tensor("a", bad)).reason


@pytest.mark.parametrize("form", [Dense(ENTRIES), LowRank(ENTRIES, ENTRIES.T), Kronecker(ENTRIES, ENTRIES)])
def test_usual_sizes_are_left_as_they_are(form):
    assert within_range(form) == (form, 0)


def test_what_is_smaller_than_float64_is_no_zero():
    factors = WeightDelta.from_factors(
        "a", *(torch.full(size, 1e-170, dtype=torch.float64) for size in ((3, 1), (1, 2)))
    )
    found = spectrum_of(factors, top=1)
    assert (found.status, found.norm, found.k, len(found.S)) == ("failed", None, 0, 0)
    assert "smaller than float64 holds, and not zero" in found.reason
