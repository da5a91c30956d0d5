"""The sides of several updates: inner products in a small basis, random ones by another way, and what is held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.peak import peak_bytes

from spectra.metrics.sides import Side, random_side

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


def test_vectors_are_held_twice_at_most():
    """The updates' own while they are put side by side; LAPACK takes one more copy of these for itself."""
    size, rank, count = 900, 4, 12

    def work():
        Side.of([torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q for _ in range(count)])

    assert peak_bytes(work) < 2.1 * 8 * size * rank * count
