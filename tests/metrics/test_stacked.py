"""Metrics of many spectra at once, held against the definition of one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spectra.metrics import METRICS
from spectra.metrics.measuring import measured, measured_together
from spectra.metrics.stacked import STACKED
from spectra.spectrum import Spectrum


def spectra_of(count: int, shape: tuple[int, int], rank: int, seed: int) -> list[Spectrum]:
    """With and without an edge, with values that are zero, unresolved or all below the edge, truncated or without."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        S = np.sort(random.exponential(size=rank))[::-1] ** random.integers(1, 4)
        S[rank - int(random.integers(0, max(1, rank // 2))) :] = 0.0 if i % 3 else 1e-18
        known = {
            "noise_edge": None if i % 4 == 0 else float(random.uniform(0, 1.2) * S[0]),
            "noise_energy": None if i % 5 == 0 else float(random.uniform(0, 1) * np.square(S).sum()),
            "resolution": float(random.choice([0.0, 1e-9 * S[0], S[rank // 2]])),
            "base_norm": None if i % 7 == 0 else float(random.uniform(0, 2)),
        }
        if i % 11 == 5:
            found.append(Spectrum(f"{i}", shape, "unsupported", reason="by hand"))
        elif i % 11 == 6:
            found.append(Spectrum(f"{i}", shape, "unchanged", S=np.zeros(rank), max_rank=rank))
        elif i % 11 == 7:
            found.append(Spectrum(f"{i}", shape, S=S[: rank // 2 + 1], norm=float(np.linalg.norm(S)), max_rank=rank))
        elif i % 11 == 8:
            found.append(Spectrum(f"{i}", shape, S=S * 1e200, max_rank=rank))
        else:
            found.append(Spectrum(f"{i}", shape, S=S, max_rank=rank, **known))
    return found


CASES = [((64, 64), 64), ((8, 200), 8), ((300, 130), 130), ((5, 7), 3), ((1, 9), 1), ((40, 40), 17)]


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_each_metric_is_that_of_one_spectrum_alone(shape, rank):
    spectra = spectra_of(90, shape, rank, seed=rank)
    for together, spectrum in zip(measured_together(spectra), spectra, strict=True):
        alone = measured(spectrum)
        assert list(together) == list(alone)
        for name, value in alone.items():
            assert type(together[name]) is float
            if "rank_9" in name:
                assert together[name] == value or (math.isnan(value) and math.isnan(together[name])), name
            assert together[name] == pytest.approx(value, rel=1e-12, nan_ok=True), (name, spectrum)


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_what_the_others_are_has_no_influence_on_one_bit(shape, rank):
    spectra = spectra_of(90, shape, rank, seed=rank + 1)
    together = measured_together(spectra)
    for start, step in ((0, 1), (1, 2), (0, 7)):
        for i in range(start, len(spectra), step):
            (alone,) = measured_together([spectra[i]])
            assert repr(alone) == repr(together[i])
    assert repr(measured_together(spectra[::-1])) == repr(together[::-1])


def test_a_stack_is_of_a_metric():
    assert METRICS.keys() >= STACKED.keys()


def test_a_metric_without_a_stack_is_measured_one_by_one():
    metrics = {"last": lambda spectrum: float(spectrum.S[-1]), **METRICS}
    spectra = [Spectrum(name, (2, 2), S=[4.0, value]) for name, value in (("a", 3.0), ("b", 2.0))]
    assert [found["last"] for found in measured_together(spectra, metrics)] == [3.0, 2.0]
    assert list(measured_together(spectra, metrics)[0]) == list(metrics)


def test_another_function_under_a_known_name_is_not_taken_for_the_stack():
    (found,) = measured_together([Spectrum("a", (2, 2), S=[4.0, 3.0])], {"norm": lambda spectrum: 7.0})
    assert found == {"norm": 7.0}
