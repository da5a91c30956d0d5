"""The sides of several updates: inner products in a small basis, random ones by another way, and what is held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.peak import peak_bytes

from spectra.metrics import sides
from spectra.metrics.alignment import Triplets
from spectra.metrics.interference import INTERFERENCE, Together, sum_of
from spectra.metrics.sides import Beside, Side, random_side

CPU = torch.device("cpu")


@given(st.integers(0, 10**6), st.sampled_from([9, 30]))
def test_a_small_basis_keeps_every_inner_product(seed, size):
    rng = np.random.default_rng(seed)
    updates = [torch.from_numpy(np.linalg.qr(rng.standard_normal((size, r)))[0]) for r in (4, 1, 5)]
    updates.append(updates[0] @ torch.from_numpy(rng.standard_normal((4, 2))))  # inside what is there
    wanted = [[own.mT @ other for other in updates] for own in updates]
    side = Side.of(updates)
    assert side.size == size
    assert side.together.shape == (min(size, 12), 12)
    for own, line in zip(side.vectors, wanted, strict=True):
        for other, inner in zip(side.vectors, line, strict=True):
            assert torch.allclose(own.mT @ other, inner, atol=1e-13)
    assert torch.allclose(side.overlap, side.together.mT @ side.together, atol=1e-13)


@pytest.mark.parametrize("size", [7, 40], ids=["more vectors than entries", "fewer"])
def test_random_vectors_overlap_as_drawn_ones_do(size):
    """Their coordinates are drawn, not they themselves: orthonormal in each update, 1/size of a square between two."""
    counts = [3, 5, 2]
    draws = torch.stack([random_side(size, counts, seed, CPU).overlap for seed in range(2000)])
    blocks = [torch.split(rows, counts, 2) for rows in torch.split(draws, counts, 1)]
    for s, line in enumerate(blocks):
        for t, block in enumerate(line):
            if s == t:
                assert torch.allclose(block, torch.eye(counts[s], dtype=torch.float64), atol=1e-12)
            else:
                assert block.square().mean((0, 1, 2)) == pytest.approx(1 / size, rel=0.05)
                assert block.mean() == pytest.approx(0, abs=0.01)
    largest = torch.linalg.eigvalsh(draws)[:, -1].mean()
    rng = np.random.default_rng(1)
    slowly = [
        np.linalg.svd(np.hstack([np.linalg.qr(rng.standard_normal((size, r)))[0] for r in counts]))[1][0] ** 2
        for _ in range(500)
    ]
    assert float(largest) == pytest.approx(np.mean(slowly), rel=0.02)


@pytest.mark.parametrize("count", [200, 300], ids=["blocks of 512 rows", "blocks of twice as many rows as columns"])
@pytest.mark.parametrize("rest", [0, 1, 37], ids=["whole blocks", "one row more", "some more"])
def test_the_triangle_of_several_blocks_is_the_factor_of_the_gram_matrix(count, rest):
    """Of columns whose lengths span ten orders of magnitude, one of zeros, equal ones and nearly equal ones."""
    height = max(512, 2 * count)
    tall = np.random.default_rng(count + rest).standard_normal((3 * height + rest, count)) * np.logspace(0, -10, count)
    tall[:, 5] = 0
    tall[:, 9] = tall[:, 8]
    tall[:, 11] = tall[:, 10] * (1 + 1e-12)
    R = sides._triangle(torch.from_numpy(tall)).numpy()
    assert R.shape == (count, count)
    assert not np.tril(R, -1).any()
    lengths = np.linalg.norm(tall, axis=0)
    scale = np.outer(lengths, lengths) + (lengths[:, None] * lengths == 0)
    assert np.abs((R.T @ R - tall.T @ tall) / scale).max() < 1e-14
    assert not R[:, 5].any()


def test_blocks_change_nothing_that_interference_computes(monkeypatch):
    """Three blocks on the left and four on the right, of updates of which two share all of one side."""
    rng = np.random.default_rng(3)
    shape, rank, count = (1100, 1300), 30, 6

    def orthonormal(size):
        return torch.from_numpy(np.linalg.qr(rng.standard_normal((size, rank)))[0])

    lefts, rights = ([orthonormal(size) for _ in range(count)] for size in shape)
    lefts[1], rights[2] = lefts[0], -rights[0]
    values = [torch.from_numpy(np.sort(rng.exponential(size=rank) ** 3)[::-1].copy()) for _ in range(count)]

    def numbers():
        left, right = Side.of(lefts), Side.of(rights)
        total = Triplets(*torch.linalg.svd(sum_of(tuple(values), left, right), full_matrices=False))
        seen = Together(tuple(values), left, right, total)
        return {name: metric(seen) for name, metric in INTERFERENCE.items()}

    triangle = sides._triangle
    blocks = []
    monkeypatch.setattr(sides, "_triangle", lambda tall: blocks.append(-(-len(tall) // 512)) or triangle(tall))
    found = numbers()
    assert blocks == [3, 3]
    monkeypatch.setattr(sides, "_triangle", lambda tall: torch.linalg.qr(tall, "r").R)
    for name, wanted in numbers().items():
        assert np.allclose(found[name], wanted, rtol=1e-10, atol=1e-13), name


def test_vectors_that_come_one_update_after_the_other_are_held_once():
    """LAPACK copies one block of rows, and the last update's own are there while they are put beside the others."""
    size, rank, count = 6000, 4, 24

    def work():
        beside = Beside(rank * count)
        for _ in range(count):
            beside.add(torch.zeros(size, rank, dtype=torch.float64))
        beside.side()

    assert 1 <= peak_bytes(work) / (8 * size * rank * count) < 1.25


def test_updates_may_have_fewer_vectors_than_were_expected_and_none_at_all():
    eye = torch.eye(6, dtype=torch.float64)
    beside = Beside(4)
    for own in (eye[:, :1], eye[:, :0], eye[:, :2]):
        beside.add(own)
    side = beside.side()
    assert [own.shape for own in side.vectors] == [(3, 1), (3, 0), (3, 2)]
    assert side.overlap.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="no update"):
        beside.side()
