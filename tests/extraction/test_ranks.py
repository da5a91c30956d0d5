"""Ranks: the least that keep an energy, the best within a budget, and errors that are what truncation leaves out."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectra
from spectra.errors import SelectionError, TruncatedSpectrumError
from spectra.extraction.budget import best_ranks
from spectra.extraction.ranks import (
    Rule,
    choose,
    kept_by_budget,
    kept_by_uniform_rank,
    relative_error,
    total_error,
)
from spectra.spectrum import Spectrum

values = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)
sizes = st.tuples(st.integers(4, 30), st.integers(4, 30))


def spectrum(name, shape, S, **fields):
    return Spectrum(name, shape, S=sorted(S, reverse=True), max_rank=len(S), **fields)


@st.composite
def several(draw):
    return [spectrum(str(i), draw(sizes), draw(values)) for i in range(draw(st.integers(1, 4)))]


def lost(spectra_, ranks):
    return sum(float(np.square(s.S[r:]).sum()) for s, r in zip(spectra_, ranks, strict=True))


def cost(spectra_, ranks):
    return sum(r * sum(s.shape) for s, r in zip(spectra_, ranks, strict=True))


def best_by_trying_all(spectra_, budget):
    every = itertools.product(*(range(len(s.S) + 1) for s in spectra_))
    return min(lost(spectra_, ranks) for ranks in every if cost(spectra_, ranks) <= budget)


@given(several(), st.integers(1, 400))
def test_a_budget_is_kept_and_no_allocation_is_better(found, budget):
    if budget < min(sum(s.shape) for s in found):
        with pytest.raises(SelectionError, match="too small for one rank"):
            choose(Rule(parameters=budget), found)
        return
    ranks = [choice.rank for choice in choose(Rule(parameters=budget), found)]
    assert cost(found, ranks) <= budget
    assert lost(found, ranks) == pytest.approx(best_by_trying_all(found, budget), abs=1e-9)


@given(several(), st.integers(60, 400))
def test_in_turn_is_optimal_up_to_the_last_step_and_leaves_nothing_that_fits(found, budget):
    gains, costs = [np.square(s.S) for s in found], [sum(s.shape) for s in found]
    with mock.patch("spectra.extraction.budget._MOST_WORK", 0):
        ranks = best_ranks(gains, costs, budget)
    left = budget - cost(found, ranks)
    following = [gain[r] for gain, r in zip(gains, ranks, strict=True) if r < len(gain)]
    assert lost(found, ranks) <= best_by_trying_all(found, budget) + max(following, default=0) * (1 + 1e-9)
    assert left >= 0
    assert all(size > left for size, gain, r in zip(costs, gains, ranks, strict=True) if r < len(gain))


@given(values, st.floats(0.01, 1))
def test_energy_gives_the_least_rank_that_keeps_it(S, energy):
    found = spectrum("a", (9, 9), S)
    (choice,) = choose(Rule(energy=energy), [found])
    assert 1 - choice.relative_error**2 >= energy - 1e-12
    if choice.rank > 1:
        assert 1 - relative_error(found, choice.rank - 1) ** 2 < energy


@given(values, st.integers(0, 4))
def test_the_error_from_the_norm_is_the_one_from_the_tail(S, rank):
    found = spectrum("a", (9, 9), S)
    truncated = Spectrum("a", (9, 9), S=found.S[:rank], norm=found.norm, max_rank=9)
    assert relative_error(truncated, rank) == pytest.approx(relative_error(found, rank), abs=3e-8)


def test_above_noise_keeps_what_is_above_the_edge_and_names_what_has_none():
    found = [spectrum("a", (5, 4), [3.0, 2.0, 0.5], noise_edge=1.0), spectrum("b", (5, 4), [0.5], noise_edge=1.0)]
    table = spectra.rank_plan(found, above_noise=True)
    assert table["rank"].tolist() == [2, 0]
    assert table["parameters"].tolist() == [18, 0]
    assert table["clamped"].tolist() == ["", "no value is above the storage rounding"]
    assert table["relative_error"][1] == 1


def test_a_rank_that_a_matrix_does_not_have_is_clamped_and_says_so():
    found = [spectrum("a", (5, 4), [3.0, 2.0]), Spectrum("b", (5, 4), "unchanged", S=[0.0] * 4)]
    table = spectra.rank_plan(found, rank=3)
    assert table["rank"].tolist() == [2, 0]
    assert table["clamped"].tolist() == ["rank 3 is more than ΔW has: 2", "unchanged: ΔW = 0"]
    assert table["relative_error"].tolist() == [0, 0]


def test_matrices_without_numbers_have_no_row():
    found = [spectrum("a", (5, 4), [3.0]), Spectrum("b", (5, 4), "nonfinite")]
    assert spectra.rank_plan(found, rank=1)["name"].tolist() == ["a"]
    assert list(spectra.rank_plan([], rank=1).columns) == list(spectra.rank_plan(found, rank=1).columns)


def test_energy_refuses_what_the_top_alone_does_not_show():
    top = Spectrum("a", (9, 9), S=[3.0], norm=5.0)
    with pytest.raises(TruncatedSpectrumError):
        spectra.rank_plan([top], energy=0.9)
    assert spectra.rank_plan([top], energy=0.3)["rank"].tolist() == [1]


@pytest.mark.parametrize(
    "rule", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0}, {"energy": 1.5}, {"parameters": 0}]
)
def test_exactly_one_rule_within_its_range(rule):
    with pytest.raises(SelectionError):
        spectra.rank_plan([spectrum("a", (5, 4), [1.0])], **rule)


@given(several())
def test_the_best_curve_is_never_below_the_uniform_one(found):
    best, uniform = kept_by_budget(found), kept_by_uniform_rank(found)
    assert best.kept[-1] == pytest.approx(1)
    assert uniform.kept[-1] == pytest.approx(1)
    assert best.parameters[-1] == uniform.parameters[-1]
    for parameters, kept in zip(uniform.parameters, uniform.kept, strict=True):
        at = np.searchsorted(best.parameters, parameters, side="right") - 1
        following = best.kept[at + 1] if at + 1 < len(best.kept) else 1.0
        assert kept <= following + 1e-9  # between two of its points the best curve is not drawn


def test_the_total_error_weighs_matrices_by_their_norms():
    found = [spectrum("a", (5, 4), [4.0, 3.0]), spectrum("b", (5, 4), [2.0, 1.0])]
    choices = choose(Rule(rank=1), found)
    assert total_error(choices) == pytest.approx(math.sqrt((9 + 1) / (25 + 5)))
