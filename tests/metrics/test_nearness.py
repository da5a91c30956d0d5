"""The bounds on the largest cosine hold, decide planted cases, and leave open what they cannot know."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectra.metrics.alignment import Triplets
from spectra.metrics.nearness import MARGIN, nearness


def orthonormal(generator, m, k):
    return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]


def base_of(kind, m, n, seed):
    """W₀ of a kind, its triplets, and the generator."""
    generator = torch.Generator().manual_seed(seed)
    s = min(m, n)
    values = {
        "power": torch.arange(1, s + 1).double() ** -0.5,
        "flat": torch.linspace(2, 1, s).double(),
        "equal": torch.ones(s).double(),
        "deficient": torch.where(torch.arange(s) < s // 2, torch.linspace(2, 1, s), 0.0).double(),
        "dominated": torch.cat([torch.tensor([1e4]), torch.linspace(2, 1, s - 1)]).double(),
    }[kind]
    U, V = orthonormal(generator, m, s), orthonormal(generator, n, s)
    return (U * values) @ V.T, Triplets(U, values, V.T), generator


def mixed(triplets, generator, count):
    """Orthonormal directions: vectors of W₀ mixed with random ones by several shares."""
    m, s = triplets.U.shape
    shares = torch.linspace(0, 1, count).double()
    picked = triplets.U[:, torch.randperm(s, generator=generator)[:count]]
    return torch.linalg.qr(shares.sqrt() * picked + (1 - shares).sqrt() * orthonormal(generator, m, count))[0]


KINDS = ["power", "flat", "equal", "deficient", "dominated"]


@given(
    st.sampled_from(KINDS), st.sampled_from([(24, 24), (16, 40), (40, 16), (60, 60)]), st.integers(0, 1000),
    st.integers(0, 6), st.sampled_from([0.3, 0.5, 0.8]),
)  # fmt: skip
def test_the_truth_is_always_between_the_bounds_and_a_count_is_the_count(kind, shape, seed, known, epsilon):
    base, all_of_them, generator = base_of(kind, *shape, seed)
    directions = mixed(all_of_them, generator, 8)
    found = nearness(base, all_of_them.first(known), directions, epsilon=epsilon)
    truth = (all_of_them.U[:, : all_of_them.rank].T @ directions).abs().amax(0)
    if kind != "equal":  # where any rotation of W₀'s vectors is W₀'s, too
        assert bool((found.least <= truth + 1e-9).all())
    assert bool((truth <= found.most + 1e-9).all())
    count = found.intruders(epsilon)
    assert count is None or count == int((truth < epsilon).sum())


@pytest.mark.parametrize("shape", [(200, 200), (120, 300), (300, 120)])
@pytest.mark.parametrize("kind", ["power", "flat"])
def test_what_is_far_or_near_is_decided_in_a_few_steps(shape, kind):
    base, triplets, generator = base_of(kind, *shape, 0)
    far = triplets.U @ orthonormal(generator, min(shape), 4)  # spread over all vectors of W₀
    found = nearness(base, triplets.first(8), far)
    assert found.intruders(0.5) == 4
    assert 0 < found.steps <= 96
    near = nearness(base, triplets.first(8), triplets.U[:, :4])
    assert (near.intruders(0.5), near.steps) == (0, 0)


def test_what_is_near_a_vector_that_is_not_at_hand_is_left_open():
    base, triplets, _ = base_of("power", 100, 100, 1)
    found = nearness(base, triplets.first(8), triplets.U[:, 50:51])
    assert found.intruders(0.5) is None
    assert float(found.most[0]) == pytest.approx(1.0)


@pytest.mark.parametrize(("cosine", "count"), [(0.5 + 2e-9, None), (0.5 - 2e-9, None), (0.51, 0)])
def test_a_cosine_at_epsilon_is_left_open_and_not_decided_by_rounding(cosine, count):
    base, triplets, _ = base_of("power", 100, 100, 2)
    spread = triplets.U[:, 20:].sum(1)
    y = cosine * triplets.U[:, 0] + (1 - cosine**2) ** 0.5 * spread / spread.norm()
    assert nearness(base, triplets.first(8), y[:, None]).intruders(0.5) == count
    assert MARGIN > 2e-9


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9])
def test_vectors_whose_values_rounding_cannot_tell_apart_are_bounded_together(gap):
    """Half of y at each of two values that are equal to `gap`: neither half may be lost between the two."""
    generator = torch.Generator().manual_seed(1)
    values = torch.linspace(2, 1, 100).double()
    values[51] = values[50] * (1 - gap)
    U, V = orthonormal(generator, 100, 100), orthonormal(generator, 100, 100)
    y = ((U[:, 50] + U[:, 51]) * 0.5 + 0.5**0.5 * U[:, 60:].sum(1) / 40**0.5)[:, None]
    found = nearness((U * values) @ V.T, Triplets(U[:, :8], values[:8], V.T[:8]), y)
    assert float(found.most[0]) >= 0.5**0.5 - 1e-9


def test_a_base_of_zeros_leaves_everything_open():
    zero = torch.zeros(6, 5, dtype=torch.float64)
    none = Triplets(zero[:, :0], zero[0, :0], zero[:0])
    assert nearness(zero, none, torch.eye(6, dtype=torch.float64)[:, :2]).intruders(0.5) in (None, 2)
