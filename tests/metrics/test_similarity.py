"""φ against its definition, its invariances, chance, clamping; principal angles."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.errors import SelectionError
from spectra.metrics.similarity import chance_level, pool, principal_angles, similarity_grid
from spectra.spectrum import Spectrum

seeds = st.integers(0, 10**6)


def basis(rng, d, k):
    return np.linalg.qr(rng.standard_normal((d, k)))[0]


def decomposed(matrix, top=8, name="layers.0.v_proj.weight"):
    (found,) = spectra.decompose([WeightDelta.from_tensor(name, torch.as_tensor(matrix))], top=top)
    return found


@given(seeds)
def test_the_grid_is_the_definition_at_every_i_and_j(seed):
    rng = np.random.default_rng(seed)
    A, B = basis(rng, 12, 5), basis(rng, 12, 4)
    grid = similarity_grid(A, B)
    for i in range(1, 6):
        for j in range(1, 5):
            slow = np.linalg.norm(A[:, :i].T @ B[:, :j], "fro") ** 2 / min(i, j)
            assert grid[i - 1, j - 1] == pytest.approx(slow, abs=1e-12)


@given(seeds)
def test_phi_relates_to_the_projection_metric_as_the_corrected_identity_says(seed):
    rng = np.random.default_rng(seed)
    p = 4
    A, B = basis(rng, 10, p), basis(rng, 10, p)
    d_squared = p - np.linalg.norm(A.T @ B, "fro") ** 2  # = ½‖AAᵀ − BBᵀ‖_F²
    assert d_squared == pytest.approx(0.5 * np.linalg.norm(A @ A.T - B @ B.T, "fro") ** 2)
    assert similarity_grid(A, B)[-1, -1] == pytest.approx(1 - d_squared / p)


@given(seeds)
def test_phi_is_symmetric_one_for_itself_and_blind_to_rotation(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((9, 7)), rng.standard_normal((9, 7))
    Q, P = basis(rng, 9, 9), basis(rng, 7, 7)
    for side in ("left", "right"):
        plain = spectra.subspace_similarity(decomposed(a), decomposed(b), top=5, side=side)
        turned = spectra.subspace_similarity(decomposed(Q @ a @ P), decomposed(Q @ b @ P), top=5, side=side)
        back = spectra.subspace_similarity(decomposed(b), decomposed(a), top=5, side=side)
        itself = spectra.subspace_similarity(decomposed(a), decomposed(a), top=5, side=side)
        assert np.allclose(plain.grid, turned.grid, atol=1e-8)
        assert np.allclose(plain.grid, back.grid.T, atol=1e-12)
        assert np.allclose(
            itself.grid, np.minimum.outer(*[np.arange(1, 6)] * 2) / np.minimum.outer(*[np.arange(1, 6)] * 2)
        )


@given(seeds)
def test_the_factors_basis_does_not_matter(seed):
    """(A, B) → (RA, BR⁻¹) leaves ΔW and so φ as they are: raw factors must not be compared."""
    rng = np.random.default_rng(seed)
    A, B, R = rng.standard_normal((3, 7)), rng.standard_normal((9, 3)), rng.standard_normal((3, 3)) + 4 * np.eye(3)
    pairs = [(B, A), (B @ np.linalg.inv(R), R @ A)]
    one, other = (
        next(iter(spectra.decompose([WeightDelta.from_factors("w", *map(torch.as_tensor, pair))], top=3)))
        for pair in pairs
    )
    assert spectra.subspace_similarity(one, other, top=3).grid[-1, -1] == pytest.approx(1, abs=1e-9)


def test_chance_is_the_mean_over_random_subspaces():
    rng = np.random.default_rng(0)
    found = np.mean([similarity_grid(basis(rng, 20, 4), basis(rng, 20, 4)) for _ in range(600)], axis=0)
    assert np.allclose(found, chance_level(4, 20), atol=0.02)


@given(seeds, st.floats(1e-9, 1.5))
def test_principal_angles_are_right_however_small(seed, angle):
    """Two planes that share one direction and enclose a known angle in the other."""
    Q = basis(np.random.default_rng(seed), 6, 6)
    A = Q[:, :2]
    B = np.column_stack([Q[:, 0], np.cos(angle) * Q[:, 1] + np.sin(angle) * Q[:, 2]])
    assert principal_angles(A, B) == pytest.approx([0, angle], rel=1e-6, abs=1e-13)
    assert np.allclose(principal_angles(A, B), np.sort(scipy.linalg.subspace_angles(A, B)), atol=1e-7)


def test_angles_of_subspaces_of_unequal_size():
    e = np.eye(5)
    assert principal_angles(e[:, :1], e[:, :3]).tolist() == [0]
    assert principal_angles(e[:, :3], e[:, 3:]) == pytest.approx([np.pi / 2] * 2)


def test_k_is_clamped_to_the_rank_and_to_the_rounding_edge_and_says_so():
    rng = np.random.default_rng(1)
    low = decomposed(rng.standard_normal((9, 2)) @ rng.standard_normal((2, 7)))
    full = decomposed(rng.standard_normal((9, 7)))
    found = spectra.subspace_similarity(full, low, top=5)
    assert found.k_used == 2
    assert found.grid.shape == found.chance.shape == (2, 2)
    assert "clamped from 5 to 2: the second update has 2 resolved" in found.note
    edged = Spectrum(full.name, full.shape, S=full.S, U=full.U, Vh=full.Vh, noise_edge=float(full.S[2]))
    assert spectra.subspace_similarity(edged, full, top=5).k_used == 2
    assert "rounding edge" in spectra.subspace_similarity(edged, full, top=5).note
    assert spectra.subspace_similarity(full, full, top=5).note == ""


def test_what_cannot_be_compared_is_refused():
    a, b = decomposed(np.eye(4) + np.arange(16).reshape(4, 4)), decomposed(np.ones((5, 4)))
    with pytest.raises(SelectionError, match="cannot be compared"):
        spectra.subspace_similarity(a, b, top=2)
    with pytest.raises(SelectionError, match="decompose with top=K"):
        spectra.subspace_similarity(a, Spectrum(a.name, a.shape, S=a.S), top=2)
    with pytest.raises(SelectionError, match="unchanged"):
        spectra.subspace_similarity(a, Spectrum(a.name, a.shape, "unchanged", S=np.zeros(4)), top=2)
    with pytest.raises(SelectionError, match="not left or right"):
        inspect.unwrap(spectra.subspace_similarity)(a, a, side="up")  # past the tests' own type check
    with pytest.raises(SelectionError, match="not a positive"):
        spectra.subspace_similarity(a, a, top=0)


def test_the_gap_says_how_well_the_directions_are_determined():
    values = np.array([5.0, 4.0, 1.0, 1.0, 0.5])
    apart = np.array([11.5, 6.5, 2.5, 1.5, 0.5])
    a, b = (Spectrum("w", (5, 5), S=S, U=np.eye(5)[:, :4], Vh=np.eye(5)[:4]) for S in (values, apart))
    assert spectra.subspace_similarity(a, b, top=2).gap == pytest.approx(min(3 / 4, 4 / 6.5))
    assert spectra.subspace_similarity(a, a, top=2).note == ""
    tied = spectra.subspace_similarity(b, a, top=3)
    assert tied.gap == 0
    assert "σ_3 and σ_4 of the second update are equal to 1e-07: its top 3 directions" in tied.note
    assert "top 3 directions" in spectra.subspace_similarity(a, b, top=4).note  # φ(3, 3) is in that grid, too
    short = Spectrum("w", (5, 5), S=values[:2], U=a.U[:, :2], Vh=a.Vh[:2], norm=9.0)
    assert np.isnan(spectra.subspace_similarity(a, short, top=2).gap)
    assert np.isnan(pool([spectra.subspace_similarity(a, other, top=2) for other in (b, short)], "w").gap)


def test_two_weights_are_both_named():
    a, b = (Spectrum(name, (2, 2), S=[2.0, 1.0], U=np.eye(2), Vh=np.eye(2)) for name in ("q_proj", "k_proj"))
    both = spectra.subspace_similarity(a, b, top=1)
    assert (both.name, both.other, both.title) == ("q_proj", "k_proj", "q_proj against k_proj")
    assert repr(both).startswith("SubspaceSimilarity(q_proj against k_proj, left")
    assert spectra.subspace_similarity(a, a, top=1).title == "q_proj"


def test_pooling_is_the_mean_as_far_as_all_reach():
    rng = np.random.default_rng(2)
    spectra_ = [decomposed(rng.standard_normal((9, 7))) for _ in range(3)]
    parts = [
        spectra.subspace_similarity(spectra_[0], other, top=k) for other, k in zip(spectra_, (5, 4, 5), strict=True)
    ]
    pooled = pool(parts, "v_proj")
    assert pooled.k_used == 4
    assert np.allclose(pooled.grid, np.mean([part.grid[:4, :4] for part in parts], axis=0))
    assert "mean over 3 matrices, k clamped to 4" in pooled.note
    clamped = spectra.subspace_similarity(spectra_[0], spectra_[1], top=50)
    assert "k clamped from 50 to 7" in pool([clamped, clamped], "v_proj").note
    with pytest.raises(SelectionError):
        pool([], "nothing")


def test_compare_streams_pairs_and_names_what_is_on_one_side_only():
    torch.manual_seed(0)
    a = [WeightDelta.from_tensor(f"layers.{i}.v_proj.weight", torch.randn(6, 5)) for i in range(40)]
    b = [WeightDelta.from_factors(d.name, torch.randn(6, 2), torch.randn(2, 5)) for d in a[:35]]
    zero = WeightDelta.from_tensor(a[35].name, torch.zeros(6, 5))
    found = list(spectra.compare(a, [*b, zero], top=3, sides=("left", "right")))
    compared = {(item.name, item.side): item for item in found if isinstance(item, spectra.SubspaceSimilarity)}
    others = {item.name: item.reason for item in found if isinstance(item, spectra.NotCompared)}
    assert len(compared) == 70
    assert len(others) == 5
    assert "unchanged" in others[a[35].name]
    assert others[a[39].name] == "only in the first update"
    one = spectra.subspace_similarity(*(next(iter(spectra.decompose([x], top=3))) for x in (a[7], b[7])), top=3)
    assert np.allclose(compared[a[7].name, "left"].grid, one.grid, atol=1e-12)
    assert compared[a[7].name, "left"].gap == pytest.approx(one.gap)
    with pytest.raises(SelectionError, match="share no matrix"):
        list(spectra.compare(a, [WeightDelta.from_tensor("other", torch.eye(2))]))
