"""ΔW against W₀: every metric against its definition as slow float64 sums, planted cases, invariances."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectra.deltas.forms import Dense, Form, LowRank
from spectra.metrics.alignment import ALIGNMENT, AgainstBase, Triplets, tie_note

seeds = st.integers(0, 10**6)


def triplets(matrix, count=None):
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return Triplets(*(torch.as_tensor(part).double() for part in (U[:, :count], S[:count], Vh[:count])))


def seen(base, update, k=4, epsilon=0.5, form: Form | None = None, r=None):
    form = form or Dense(torch.as_tensor(update))
    return AgainstBase(triplets(base), form, triplets(update, r or k), triplets(base + update, k), k, epsilon)


def values(case):
    return {name: metric(case) for name, metric in ALIGNMENT.items()}


def slowly(base, update, k, epsilon, r):
    """The definitions, written out; W₀ here is of full rank."""
    m, n = base.shape
    X, S, Zh = np.linalg.svd(base, full_matrices=False)
    Y = np.linalg.svd(base + update)[0]
    U, _, Vh = np.linalg.svd(update)
    energy = np.linalg.norm(update) ** 2
    cosines = [max(abs(float(Y[:, j] @ X[:, i])) for i in range(len(S))) for j in range(k)]
    cuts = [round(i * len(S) / 10) for i in range(11)]

    def inside(left, right):
        return np.linalg.norm(left @ left.T @ update @ right.T @ right) ** 2 / energy

    return {
        "intruders": sum(cosine < epsilon for cosine in cosines),
        "largest_cosines": cosines,
        "amplification": np.sqrt(energy) / np.linalg.norm(U[:, :r].T @ base @ Vh[:r].T),
        "amplification_own": np.sqrt(energy) / np.linalg.norm(X[:, :r].T @ base @ Zh[:r].T),
        "left_in_top": np.linalg.norm(X[:, :k].T @ update) ** 2 / energy,
        "right_in_top": np.linalg.norm(update @ Zh[:k].T) ** 2 / energy,
        "left_chance": k / m,
        "right_chance": k / n,
        "left_deciles": [np.linalg.norm(X[:, a:b].T @ update) ** 2 / energy for a, b in pairwise(cuts)],
        "right_deciles": [np.linalg.norm(update @ Zh[a:b].T) ** 2 / energy for a, b in pairwise(cuts)],
        "principal_top": inside(X[:, :k], Zh[:k]),
        "principal_bottom": inside(X[:, -k:], Zh[-k:]),
        "sigma_1_ratio": np.linalg.norm(base + update, 2) / S[0],
        "sigma_ratios": list(np.linalg.svd(base + update, compute_uv=False)[:k] / S[:k]),
        "stable_rank_base": (np.linalg.norm(base) / S[0]) ** 2,
        "stable_rank_tuned": (np.linalg.norm(base + update) / np.linalg.norm(base + update, 2)) ** 2,
        "cosines": np.abs(X[:, :k].T @ Y[:, :k]).tolist(),
    }


@given(seeds, st.sampled_from([(12, 12), (17, 9), (9, 17)]), st.sampled_from([0.1, 3.0]))
def test_every_metric_is_its_definition(seed, shape, size):
    rng = np.random.default_rng(seed)
    base, update = rng.standard_normal(shape), size * rng.standard_normal(shape)
    found = values(seen(base, update, k=4, epsilon=0.6, r=3))
    wanted = slowly(base, update, 4, 0.6, 3)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(np.asarray(value, dtype=float), rel=1e-9, abs=1e-12), name
    chances = {"intruders_chance", "amplification_random", "principal_random"}
    assert set(found) == {*wanted, *chances}, "a metric without its definition, or without a chance level's test"


@given(seeds)
def test_factors_give_what_the_product_gives_in_whatever_basis_they_are(seed):
    rng = np.random.default_rng(seed)
    base, B, A = rng.standard_normal((11, 8)), rng.standard_normal((11, 3)), rng.standard_normal((3, 8))
    R = rng.standard_normal((3, 3)) + 4 * np.eye(3)
    plain = values(seen(base, B @ A, r=3))
    turned = LowRank(torch.as_tensor(B @ np.linalg.inv(R)), torch.as_tensor(R @ A))
    for name, value in values(seen(base, B @ A, r=3, form=turned)).items():
        assert value == pytest.approx(np.asarray(plain[name], dtype=float), rel=1e-7, abs=1e-10), name


@given(seeds)
def test_rotating_both_spaces_or_scaling_both_weights_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    base, update = rng.standard_normal((9, 12)), rng.standard_normal((9, 12))
    Q, P = (np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (9, 12))
    plain = values(seen(base, update))
    for name, value in values(seen(7 * Q @ base @ P, 7 * Q @ update @ P)).items():
        assert value == pytest.approx(np.asarray(plain[name], dtype=float), rel=1e-7, abs=1e-9), name


def spread(rng, size=64):
    """W₀ with a clear spectrum, and its vectors."""
    X, Z = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    return X, np.linspace(4, 1, size), Z


@pytest.mark.parametrize("planted", [0, 1, 3])
def test_a_planted_spike_is_one_intruder(planted):
    X, S, Z = spread(np.random.default_rng(planted))
    signs = np.sign(np.random.default_rng(5).standard_normal((64, 64)))
    Q = np.linalg.qr(signs)[0][:, :planted]  # spread over all of W₀'s directions
    found = values(seen(X * S @ Z.T, 50 * (X @ Q) @ (Z @ Q).T if planted else 1e-9 * X @ Z.T, k=10))
    assert found["intruders"] == planted
    assert sum(cosine < 0.5 for cosine in found["largest_cosines"]) == planted


def test_an_update_inside_the_top_subspace_makes_no_intruder():
    X, S, Z = spread(np.random.default_rng(2))
    found = values(seen(X * S @ Z.T, 0.5 * (X[:, :4] * S[:4]) @ Z[:, :4].T, k=4))
    assert found["intruders"] == 0
    assert found["largest_cosines"] == pytest.approx([1.0] * 4)
    for name in ("left_in_top", "right_in_top", "principal_top"):
        assert found[name] == pytest.approx(1.0)
    assert found["amplification"] == pytest.approx(0.5)
    assert found["principal_bottom"] == pytest.approx(0.0, abs=1e-12)


def test_a_direction_that_the_base_does_not_use_is_an_intruder_and_amplified_beyond_bounds():
    """Vectors of W₀'s zero values are whatever a solver makes of them: they are not W₀'s directions."""
    base, update = np.diag([3.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 0.0, 5.0])
    found = values(seen(base, update, k=1))
    assert found["intruders"] == 1
    assert found["amplification"] == math.inf


def test_chance_levels_are_what_random_directions_give():
    rng = np.random.default_rng(3)
    base = rng.standard_normal((40, 30))
    case = seen(base, rng.standard_normal((40, 30)), k=5, epsilon=0.75)
    draws = []
    for _ in range(400):
        U, V = (np.linalg.qr(rng.standard_normal((d, 5)))[0] for d in base.shape)
        draws.append(np.linalg.norm(U.T @ base @ V) ** 2)
    mean = case.update.norm / math.sqrt(np.mean(draws))
    assert ALIGNMENT["amplification_random"](case) == pytest.approx(mean, rel=0.02)
    assert ALIGNMENT["principal_random"](case) == 25 / 1200


def test_the_intruders_chance_is_a_lower_bound_and_exact_where_only_one_vector_can_be_near():
    rng = np.random.default_rng(4)
    X = np.linalg.qr(rng.standard_normal((6, 6)))[0][:, :4]
    directions = rng.standard_normal((6, 40_000))
    cosines = np.abs(X.T @ (directions / np.linalg.norm(directions, axis=0))).max(0)
    base = X * [4.0, 3.0, 2.0, 1.0] @ np.eye(4)
    for epsilon in (0.5, 0.75):
        case = seen(base, rng.standard_normal((6, 4)), k=2, epsilon=epsilon)
        share = 2 * float((cosines < epsilon).mean())
        assert ALIGNMENT["intruders_chance"](case) <= share + 0.02
    assert ALIGNMENT["intruders_chance"](case) == pytest.approx(share, abs=0.02)


def test_equal_values_of_the_base_are_one_space_and_no_basis_of_it_changes_the_count():
    """σ₂ = σ₃ = σ₄ of W₀: a direction between their vectors is known to W₀, whichever basis LAPACK gives."""
    rng = np.random.default_rng(2)
    X, _, Z = spread(rng, 12)
    S = torch.tensor([5.0, 3, 3, 3, 1, 0.5, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06], dtype=torch.float64)
    y = torch.as_tensor(X[:, 1:4].sum(1, keepdims=True) / math.sqrt(3))
    spike = Triplets(y, torch.ones(1).double(), torch.as_tensor(Z[:, :1].T.copy()))
    counts = []
    for _ in range(5):
        turn = np.eye(12)
        turn[1:4, 1:4] = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        base = Triplets(torch.as_tensor(X @ turn), S, torch.as_tensor((Z @ turn).T.copy()))
        case = AgainstBase(base, LowRank(y, y.mT), spike, spike, k=2, epsilon=0.95)
        assert ALIGNMENT["largest_cosines"](case) == pytest.approx([1.0])
        counts.append(ALIGNMENT["intruders"](case))
        assert "σ_2 and σ_3 of W₀ are equal" in tie_note(case)
    assert counts == [0] * 5
    assert base.groups == [1, 3, *[1] * 8]


def test_the_chance_of_equal_values_is_that_of_their_space():
    m, epsilon = 6, 0.8
    eye = torch.eye(m, dtype=torch.float64)
    base = Triplets(eye[:, :2], torch.ones(2).double(), eye[:2])
    y = torch.as_tensor(np.random.default_rng(0).standard_normal((m, 20000)))
    y = y / y.norm(dim=0)
    share = float((base.nearest(y) < epsilon).double().mean())
    one = Triplets(y[:, :1], torch.ones(1).double(), y[:, :1].mT)
    case = AgainstBase(base, LowRank(one.U, one.Vh), one, one, k=1, epsilon=epsilon)
    assert ALIGNMENT["intruders_chance"](case) == pytest.approx(share, abs=0.02)
