"""Interference of several updates against its definitions on products, planted cases, invariances."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import LowRank
from spectra.metrics.interference import INTERFERENCE
from spectra.metrics.shared_basis import SharedBasis
from spectra.metrics.sides import Side

seeds = st.integers(0, 10**6)


def factored(*pairs):
    return [[WeightDelta.from_factors("w", *map(torch.as_tensor, pair))] for pair in pairs]


def dense(*matrices):
    return [[WeightDelta.from_tensor("w", torch.as_tensor(matrix))] for matrix in matrices]


def row(sources):
    (found,) = spectra.interference(sources).to_dict("records")
    return found


def slowly(updates):
    """The definitions on products; every update of full numerical rank but for rounding."""
    m = updates[0].shape[0]
    parts = [np.linalg.svd(update, full_matrices=False) for update in updates]
    kept = [int((1e-10 * S[0] < S).sum()) for _, S, _ in parts]
    U = np.hstack([part[0][:, :r] for part, r in zip(parts, kept, strict=True)])
    S = np.concatenate([part[1][:r] for part, r in zip(parts, kept, strict=True)])
    V = np.hstack([part[2][:r].T for part, r in zip(parts, kept, strict=True)])
    norms = [np.linalg.norm(update) for update in updates]
    total = sum(updates)
    left, values, _ = np.linalg.svd(total)
    k = next(k for k in range(1, len(values) + 1) if np.linalg.norm(values[k:]) <= 0.05 * np.linalg.norm(total))
    top = left[:, :k] @ left[:, :k].T
    raw = np.abs((U.T @ U - np.eye(len(S))) @ np.diag(S) @ (V.T @ V - np.eye(len(S)))).sum()
    return {
        "cosines": [[(a * b).sum() / x / y for b, y in zip(updates, norms, strict=True)]
                    for a, x in zip(updates, norms, strict=True)],
        "norms": norms,
        "norm_ratio": np.linalg.norm(total) ** 2 / sum(norm**2 for norm in norms),
        "sti_raw": raw,
        "sti": raw / S.sum(),
        "sar": [np.linalg.norm(top @ update) / norm for update, norm in zip(updates, norms, strict=True)],
        "sar_k": k,
        "sar_chance": math.sqrt(k / m),
        "mean_cosine": np.mean([(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
                                for a, b in combinations(updates, 2)]),
        "mean_sar": np.mean([np.linalg.norm(top @ update) / norm for update, norm in zip(updates, norms, strict=True)]),
        **shared_slowly(updates),
    }  # fmt: skip


def needed(values):
    """How many hold nine tenths of the energy, counted one by one."""
    total = 0.0
    for k, value in enumerate(values, start=1):
        total += value**2
        if total >= 0.9 * (values**2).sum() * (1 - 1e-12):
            return k
    return 0


def shared_slowly(updates):
    """The definitions on the joined matrix."""
    k = max(needed(np.linalg.svd(update)[1]) for update in updates)
    mean = sum(updates) / len(updates)
    apart = [update - mean for update in updates]
    left, values, _ = np.linalg.svd(np.hstack(apart), full_matrices=False)
    energy = sum(np.linalg.norm(update) ** 2 for update in updates)
    return {
        "mean_share": len(updates) * np.linalg.norm(mean) ** 2 / energy,
        "mean_share_chance": 1 / len(updates),
        "shared_k": k,
        "shared": (values[:k] ** 2).sum() / (values**2).sum(),
        "shared_kept": [np.linalg.norm(left[:, :k].T @ one) ** 2 / np.linalg.norm(one) ** 2 for one in apart],
    }


def same(found, wanted):
    for name in INTERFERENCE.keys() & wanted.keys():
        assert np.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-8, equal_nan=True), name


@given(seeds, st.sampled_from([(10, 14), (14, 10)]), st.sampled_from([2, 3]))
def test_factors_give_the_definitions_of_their_products(seed, shape, count):
    """Of unequal ranks, and together of more directions than the weight has rows or columns, too."""
    rng = np.random.default_rng(seed)
    ranks = [2, 5, 4][:count]
    pairs = [(rng.standard_normal((shape[0], r)), rng.standard_normal((r, shape[1]))) for r in ranks]
    same(row(factored(*pairs)), slowly([B @ A for B, A in pairs]))


@given(seeds)
def test_full_updates_give_the_definitions(seed):
    rng = np.random.default_rng(seed)
    updates = [rng.standard_normal((6, 9)) for _ in range(2)]
    same(row(dense(*updates)), slowly(updates))


@given(seeds)
def test_another_basis_of_the_factors_or_a_rotation_of_the_spaces_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    pairs = [(rng.standard_normal((9, 3)), rng.standard_normal((3, 8))) for _ in range(2)]
    Q, P = (np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (9, 8))
    R = rng.standard_normal((3, 3)) + 4 * np.eye(3)
    plain = row(factored(*pairs))
    same(row(factored(*[(B @ np.linalg.inv(R), R @ A) for B, A in pairs])), plain)
    same(row(factored(*[(Q @ B, A @ P) for B, A in pairs])), plain)


@pytest.mark.parametrize("kind", [factored, dense])
def test_a_negated_update_has_cosine_minus_one_and_the_sum_is_nothing(kind):
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((12, 3)), rng.standard_normal((3, 9))
    found = row(kind((B, A), (-B, A)) if kind is factored else kind(B @ A, -B @ A))
    assert found["cosines"] == [[1.0, -1.0], [-1.0, 1.0]], "exactly"
    assert found["norm_ratio"] == 0
    assert np.isnan(found["sar"]).all()
    assert found["status"] == "ok"


def test_equal_updates_add_up_and_orthogonal_ones_do_not_interfere():
    eye = np.eye(6)
    one, other = (eye[:, :2], 3 * eye[:2]), (eye[:, 2:4], 3 * eye[2:4])
    equal = row(factored(one, one))
    assert equal["norm_ratio"] == pytest.approx(2)
    assert equal["cosines"][0][1] == pytest.approx(1)
    assert equal["sar"] == pytest.approx([1, 1])
    apart = row(factored(one, other))
    assert (apart["norm_ratio"], apart["cosines"][0][1], apart["sti"]) == pytest.approx((1, 0, 0), abs=1e-12)


def test_an_update_that_is_zero_has_no_cosine():
    eye = np.eye(4)
    found = row(factored((eye[:, :1], eye[:1]), (np.zeros((4, 1)), eye[:1]), (eye[:, :1], 2 * eye[:1])))
    assert np.isnan(found["cosines"][1]).all()
    assert math.isnan(found["sar"][1])
    assert found["cosines"][0][2] == pytest.approx(1)
    assert found["norm_ratio"] == pytest.approx(9 / 5)


def test_a_space_of_all_updates_is_told_from_their_mean_and_from_chance():
    rng = np.random.default_rng(4)
    m, n, r, count = 60, 50, 3, 6
    common, own = rng.standard_normal((m, r)), rng.standard_normal((m, n)) / 100
    one_space = row(dense(*[common @ rng.standard_normal((r, n)) for _ in range(count)]))
    assert one_space["shared"] > 0.85
    assert min(one_space["shared_kept"]) > 0.7
    assert one_space["shared_null"] < 0.4
    assert one_space["mean_share"] == pytest.approx(1 / count, abs=0.1)
    apart = row(factored(*[(rng.standard_normal((m, r)), rng.standard_normal((r, n))) for _ in range(count)]))
    assert apart["shared"] == pytest.approx(apart["shared_null"], abs=0.05)
    assert apart["shared_null"] < 0.45
    mean = 20 * rng.standard_normal((m, 1)) @ rng.standard_normal((1, n))
    shifted = row(dense(*[mean + own * sign for sign in (1, -1)]))
    assert shifted["mean_share"] == pytest.approx(1, abs=1e-3)
    equal = row(factored(*[(np.eye(m)[:, :r], np.eye(n)[:r])] * 3))
    assert math.isnan(equal["shared"])
    assert np.isnan(equal["shared_kept"]).all()
    assert math.isnan(equal["shared_null"])  # there is nothing to be random
    assert equal["mean_share"] == pytest.approx(1)


def test_the_null_keeps_the_values_and_is_the_same_each_time():
    rng = np.random.default_rng(5)
    pairs = [(rng.standard_normal((30, 4)), rng.standard_normal((4, 20))) for _ in range(3)]
    first, again = row(factored(*pairs)), row(factored(*pairs))
    assert first["shared_null"] == again["shared_null"]
    turned = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    moved = row(factored(*[(turned @ B, A) for B, A in pairs]))
    assert moved["shared_null"] == pytest.approx(first["shared_null"]), "of the singular values alone"


def test_the_null_is_that_of_what_differs_and_not_of_the_mean():
    """Updates that are one strong mean and unrelated rests share no more than such rests do."""
    rng = np.random.default_rng(6)
    m, n, r, count = 120, 90, 4, 5
    mean = 30 * rng.standard_normal((m, 1)), rng.standard_normal((1, n))
    rests = [(rng.standard_normal((m, r)), rng.standard_normal((r, n))) for _ in range(count)]
    found = row(factored(*[(np.hstack([mean[0], B]), np.vstack([mean[1], A])) for B, A in rests]))
    assert found["mean_share"] > 0.6
    assert found["shared"] == pytest.approx(found["shared_null"], abs=0.05)
    k = found["shared_k"]
    mean_kept = [np.linalg.svd(B @ A - sum(b @ a for b, a in rests) / count)[1][: r + 1] for B, A in rests]
    draws = [np.linalg.qr(rng.standard_normal((m, r + 1)))[0] * values for values in mean_kept]
    values = np.linalg.svd(np.hstack(draws))[1] ** 2
    assert found["shared_null"] == pytest.approx(values[:k].sum() / values.sum(), abs=0.03)


@pytest.mark.parametrize(
    ("shape", "ranks", "sizes", "times"),
    [
        ((6, 9), (2, 2), (1, 1), 150),
        ((40, 50), (4, 4, 4), (1, 1, 1), 60),
        ((40, 50), (2, 5, 9), (1, 1, 1), 40),
        ((40, 50), (4, 4, 4), (1, 3, 10), 30),
        ((20, 20), (20, 20), (1, 1), 30),
        ((60, 50), (4,) * 8, (1,) * 8, 15),
    ],
)
def test_of_unrelated_updates_the_null_is_what_they_share_on_average(shape, ranks, sizes, times):
    """Over many draws of random updates: in a small space, too, and of unequal ranks and sizes."""
    rng = np.random.default_rng(11)
    found = []
    for _ in range(times):
        updates = [
            size * rng.standard_normal((shape[0], r)) @ rng.standard_normal((r, shape[1]))
            for size, r in zip(sizes, ranks, strict=True)
        ]
        together = [torch.linalg.svd(torch.from_numpy(update), full_matrices=False) for update in updates]
        left = [U[:, :r].contiguous() for (U, _, _), r in zip(together, ranks, strict=True)]
        right = [Vh[:r].mT.contiguous() for (_, _, Vh), r in zip(together, ranks, strict=True)]
        values = tuple(S[:r] for (_, S, _), r in zip(together, ranks, strict=True))
        basis = SharedBasis(values, Side.of(left), Side.of(right))
        found.append((basis.share, basis.null()))
    share, null = np.mean(found, axis=0)
    assert null == pytest.approx(share, abs=0.015)


def test_factors_are_never_multiplied_out(monkeypatch):
    rng = np.random.default_rng(1)
    pairs = [(rng.standard_normal((40, 2)), rng.standard_normal((2, 30))) for _ in range(3)]
    sources = factored(*pairs)
    monkeypatch.setattr(LowRank, "to_dense", None)
    assert row(sources)["status"] == "ok"
