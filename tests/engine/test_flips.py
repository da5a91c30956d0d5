"""The parts of the edge that ΔW shows by itself, against full decompositions."""

from __future__ import annotations

import pytest
import torch

from spectra.deltas.forms import Dense
from spectra.deltas.rounding import Noise
from spectra.engine import flips
from spectra.engine.flips import top_values, top_vectors, with_flips


def falling(m, n, count, noise=1e-2):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, count, dtype=torch.float64)).Q for size in (m, n))
    return (left * 0.7 ** torch.arange(count)) @ right.T + noise * torch.randn(m, n, dtype=torch.float64) / n**0.5


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (3, 5), (1, 4)])
def test_the_largest_values_are_those_of_a_full_decomposition(shape):
    matrix = falling(*shape, min(shape))
    exact = torch.linalg.svdvals(matrix)[:4].numpy()
    assert top_values(matrix, 4)[: len(exact)] == pytest.approx(exact, rel=1e-6)
    noise = torch.randn(shape, dtype=torch.float64)
    assert top_values(noise, 1)[0] == pytest.approx(float(torch.linalg.matrix_norm(noise, 2)), rel=0.01)


@pytest.mark.parametrize("shape", [(1, 4), (32, 32), (48, 64), (64, 48), (128, 128), (32, 512)])
def test_the_draws_of_a_small_matrix_are_exact_and_those_of_the_krylov_space(shape):
    torch.manual_seed(1)
    rest = torch.randn(shape)
    generator, flipped, exact = torch.Generator().manual_seed(5), rest.clone(), []
    for _ in range(3):
        flipped *= torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
        exact.append(float(torch.linalg.matrix_norm(flipped.double(), 2)))
    assert flips._together(rest, 5) == pytest.approx(exact, rel=2e-6)
    assert flips._together(rest, 5) == pytest.approx(flips._in_turn(rest.clone(), 5), rel=1e-3)
    assert flips._together(torch.zeros(shape), 5) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (64, 48)])
def test_the_edge_of_a_small_update_is_that_of_the_krylov_space(shape, monkeypatch):
    matrix = falling(*shape, 4)
    S = torch.linalg.svdvals(matrix).numpy()
    noise = Noise(0.05, float((1e-2) ** 2 * 64), "high")
    at_once = with_flips(noise, Dense(matrix), S)
    assert at_once.edge < noise.edge
    monkeypatch.setattr(flips, "_SMALL", 0)
    assert with_flips(noise, Dense(matrix), S).edge == pytest.approx(at_once.edge, rel=3e-6)


@pytest.mark.parametrize("near", [False, True])
def test_the_vectors_are_those_of_a_full_decomposition(near):
    matrix = falling(120, 90, 10)
    U, S, Vh = torch.linalg.svd(matrix)
    start = (Vh[:4] + 0.01 * torch.randn(4, 90, dtype=torch.float64)) if near else None
    left, values, right = top_vectors(matrix, 4, start)
    assert values.numpy() == pytest.approx(S[:4].numpy(), rel=1e-3)
    assert ((left * values) @ right - (U[:, :4] * S[:4]) @ Vh[:4]).norm() < 0.01 * S[3]


def test_the_edge_is_lowered_to_what_the_rest_has_and_never_raised():
    matrix = falling(300, 300, 6)
    S = torch.linalg.svdvals(matrix).numpy()
    form, energy = Dense(matrix), float((1e-2) ** 2 * 300)
    lowered = with_flips(Noise(0.05, energy, "high"), form, S)
    assert 0.02 < lowered.edge < 0.0225  # 1e-2·2
    assert with_flips(Noise(0.0205, energy, "low"), form, S).edge <= 0.0205
    many = Noise(1e-3, energy, "all of them stand out")
    assert with_flips(many, form, S) == many
    lost = Noise(0.05, 1e-16, "no energy")
    assert with_flips(lost, form, S) == lost
