"""Every metric against its slow definition, and the laws they obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spectra.errors import TruncatedSpectrumError
from spectra.metrics import METRICS
from spectra.metrics.dominance import gini, top_k_share
from spectra.metrics.rank import rank_at
from spectra.metrics.signal import signal
from spectra.spectrum import Spectrum

values = arrays(np.float64, st.integers(1, 12), elements=st.floats(1e-3, 10.0)).map(lambda s: np.sort(s)[::-1])


def spectrum(S, **fields):
    return Spectrum("layers.0.v_proj.weight", (len(S), len(S)), S=S, **fields)


def slow(S, base_norm):
    """The definitions, as sums over single values."""
    total, energy = sum(S), sum(s * s for s in S)
    p, e = [s / total for s in S], [s * s / energy for s in S]

    def rank(share):
        return next(k for k in range(1, len(S) + 1) if sum(e[:k]) >= share * (1 - 1e-12))

    ascending = sorted(S)
    return {
        "norm": math.sqrt(energy),
        "sigma_1": S[0],
        "relative_norm": math.sqrt(energy) / base_norm,
        "stable_rank": energy / S[0] ** 2,
        "effective_rank": math.exp(-sum(x * math.log(x) for x in p)),
        "energy_entropy_rank": math.exp(-sum(x * math.log(x) for x in e if x > 0)),
        "participation_ratio": energy**2 / sum(s**4 for s in S),
        "nuclear_rank": total**2 / energy,
        "rank_90": rank(0.90),
        "rank_95": rank(0.95),
        "rank_99": rank(0.99),
        "top_1_share": e[0],
        "top_8_share": sum(e[:8]),
        "top_20_share": sum(e[:20]),
        "top_value_share": p[0],
        # half the mean absolute difference over the mean: the Gini coefficient's own definition
        "gini_max_rank": sum(abs(a - b) for a in ascending for b in ascending) / (2 * len(S) * total),
        "gini_all": sum(abs(a - b) for a in ascending for b in ascending) / (2 * len(S) * total),  # of full rank here
    }


@given(values)
def test_every_metric_is_its_definition(S):
    expected = slow(list(S), base_norm=7.0)
    expected |= {name: expected[name.removeprefix("signal_")] for name in METRICS if name.startswith("signal_")}
    assert set(expected) == set(METRICS)
    for name, metric in METRICS.items():
        assert metric(spectrum(S, base_norm=7.0)) == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


SCALED = {"norm", "sigma_1", "relative_norm", "signal_norm"}


@given(values, st.floats(1e-6, 1e6))
def test_ranks_and_shares_do_not_depend_on_the_scale(S, c):
    for name, metric in METRICS.items():
        expected = metric(spectrum(S, base_norm=1.0)) * (c if name in SCALED else 1.0)
        assert metric(spectrum(c * S, base_norm=1.0)) == pytest.approx(expected, rel=1e-9, abs=1e-9), name


@given(values)
def test_soft_ranks_are_ordered_and_bounded(S):
    found = {name: metric(spectrum(S)) for name, metric in METRICS.items()}
    slack = 1 + 1e-9
    assert found["stable_rank"] * slack >= 1
    assert found["participation_ratio"] <= found["energy_entropy_rank"] * slack
    assert found["energy_entropy_rank"] <= found["effective_rank"] * slack <= len(S) * slack * slack
    assert found["rank_90"] <= found["rank_95"] <= found["rank_99"] <= len(S)


def test_equal_values_are_democratic_and_one_value_dominates():
    equal, one = spectrum(np.ones(5)), spectrum(np.array([3.0, 0, 0, 0, 0]))
    assert gini(equal) == pytest.approx(0)
    assert gini(one) == pytest.approx(4 / 5)
    for name in ("stable_rank", "effective_rank", "energy_entropy_rank", "participation_ratio", "nuclear_rank"):
        assert METRICS[name](equal) == pytest.approx(5)
        assert METRICS[name](one) == pytest.approx(1)


@given(values, st.integers(0, 30))
def test_one_convention_compares_updates_of_different_rank(S, zeros):
    """The same values are as unequal whether the rank forbids the others or they happen to be zero."""
    size = len(S) + zeros
    factored = Spectrum("a", (size, size + 2), S=S, max_rank=len(S))
    full = Spectrum("a", (size, size + 2), S=np.concatenate([S, np.zeros(zeros)]))
    assert METRICS["gini_all"](factored) == pytest.approx(METRICS["gini_all"](full), abs=1e-12)
    assert METRICS["gini_all"](full) == pytest.approx(METRICS["gini_max_rank"](full))
    assert METRICS["gini_max_rank"](factored) == pytest.approx(gini(spectrum(S)))


def test_under_truncation_a_metric_is_exact_or_refuses():
    """64 of 1024 values kept must not turn an effective rank of 700 into 60."""
    S = np.linspace(1.0, 0.1, 1024)
    whole = Spectrum("w", (1024, 1024), S=S)
    top = Spectrum("w", (1024, 1024), S=S[:64], norm=whole.norm)
    for name, metric in METRICS.items():
        try:
            found = metric(top)
        except TruncatedSpectrumError:
            continue
        if name == "relative_norm":
            continue  # no base here: NaN for both
        assert found == pytest.approx(metric(whole), rel=1e-12), name
    assert METRICS["stable_rank"](top) == METRICS["stable_rank"](whole)
    assert rank_at(top, 0.05) == rank_at(whole, 0.05)
    with pytest.raises(TruncatedSpectrumError, match="decompose without only_top"):
        rank_at(top, 0.9)
    with pytest.raises(TruncatedSpectrumError):
        top_k_share(top, 65)


def test_unresolved_values_count_as_zero():
    noisy = Spectrum("w", (4, 4), S=[1.0, 1e-8, 1e-8, 1e-8], resolution=1e-7)
    clean = Spectrum("w", (4, 4), S=[1.0, 0, 0, 0])
    assert noisy.rank == clean.rank == 1
    for name in ("effective_rank", "gini_max_rank", "gini_all", "nuclear_rank", "top_value_share"):
        assert METRICS[name](noisy) == METRICS[name](clean)


def test_an_unchanged_matrix_has_no_ranks():
    zero = Spectrum("w", (3, 3), "unchanged", S=np.zeros(3))
    found = {name: metric(zero) for name, metric in METRICS.items()}
    assert found.pop("norm") == found.pop("sigma_1") == found.pop("signal_norm") == 0
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("shape", [(300, 200), (120, 400)])
def test_the_signal_s_values_are_those_before_the_noise(shape):
    rng = np.random.default_rng(0)
    m, n = shape
    U, V = (np.linalg.qr(rng.standard_normal((size, 4)))[0] for size in shape)
    exact, variance = np.array([9.0, 7.0, 5.0, 3.0]), 1e-2**2
    stored = np.linalg.svd((U * exact) @ V.T + 1e-2 * rng.standard_normal(shape), compute_uv=False)
    edge = 1.02e-2 * (math.sqrt(m) + math.sqrt(n))
    found = Spectrum("w", shape, S=stored, noise_edge=edge, noise_energy=variance * m * n)
    assert np.allclose(signal(found).S, exact, rtol=0.015)
    assert METRICS["signal_norm"](found) == pytest.approx(np.linalg.norm(exact), rel=5e-3)
    assert METRICS["signal_effective_rank"](found) == pytest.approx(
        METRICS["effective_rank"](spectrum(exact)), rel=1e-3
    )
    assert METRICS["signal_rank_99"](found) == METRICS["rank_99"](spectrum(exact)) == 4
    assert METRICS["effective_rank"](found) > 8


def test_the_signal_of_a_truncated_spectrum_is_exact_or_refused():
    whole = Spectrum("w", (6, 6), S=[9.0, 8.0, 1.0, 0.9, 0.8, 0.7], noise_edge=2.0, noise_energy=4.0)
    fields = {"norm": whole.norm, "noise_edge": 2.0, "noise_energy": 4.0}
    for name in (name for name in METRICS if name.startswith("signal_")):
        assert METRICS[name](Spectrum("w", (6, 6), S=whole.S[:3], **fields)) == METRICS[name](whole)
        with pytest.raises(TruncatedSpectrumError, match="more may be"):
            METRICS[name](Spectrum("w", (6, 6), S=whole.S[:2], **fields))


def test_rounding_alone_has_no_signal():
    hump = Spectrum("w", (3, 3), S=[1.0, 0.9, 0.8], noise_edge=1.1, noise_energy=3.0)
    assert METRICS["signal_norm"](hump) == 0
    assert all(
        math.isnan(METRICS[name](hump)) for name in METRICS if name.startswith("signal_") and name != "signal_norm"
    )
