"""The filter against a full eigendecomposition, what it refuses, and the certificate."""

from __future__ import annotations

import pytest
import torch
from spectra_kinds import angle, matrix_of, oracle

from spectra.engine import dense, topk
from spectra.engine.ladder import GRAM_CERTIFIED, GRAM_EIGH, GRAM_FILTER
from spectra.engine.solve import solve
from spectra.types import WeightDelta

SIZE, K = 320, 8


@pytest.fixture(scope="module")
def grams():
    kinds = ("gaussian", "power", "exponential", "clustered", "rank deficient", "bf16 noise", "bf16 merge")
    return {kind: dense.gram(matrix_of(kind, SIZE, SIZE + 20)) for kind in kinds}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "power", "exponential", "rank deficient", "bf16 noise", "bf16 merge"])
def test_finds_the_leading_subspace(grams, kind, known):
    gram = grams[kind]
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    found = topk.leading_eigenvectors(gram, K, values if known else None)
    assert torch.allclose(found.values, values[:K], rtol=1e-9)
    assert angle(vectors[:, :K], found.vectors) <= 1e-5
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(K).double(), atol=1e-10)
    assert topk.certify(gram, found)


@pytest.mark.parametrize("known", [True, False])
def test_no_gap_at_k_gives_vectors_with_small_residuals(grams, known, monkeypatch):
    monkeypatch.setattr(topk, "_MOST_WORK", 4 * topk._MOST_WORK)  # at this size the limit is a matter of rounding
    gram = grams["clustered"]  # 80 equal values
    values = dense.eigenvalues(gram)
    found = topk.leading_eigenvectors(gram, K, values if known else None)
    assert (gram @ found.vectors - found.vectors * found.values).norm() <= 1e-8 * float(values[0])


def test_a_tiny_gap_in_front_of_a_cluster_is_left_to_the_full_solver():
    values = torch.ones(SIZE).double()
    values[:K] += 1e-6
    with pytest.raises(topk.NotConvergedError, match="too close"):
        topk.leading_eigenvectors(torch.diag(values), K, values)
    with pytest.raises(topk.NotConvergedError, match="wanted"):
        topk.leading_eigenvectors(torch.diag(values), K)


def test_too_many_vectors_are_left_to_the_full_solver():
    with pytest.raises(topk.NotConvergedError, match="too many"):
        topk.leading_eigenvectors(torch.eye(100).double(), 30)


def test_certificate_sees_a_missed_value(grams):
    gram = grams["power"]
    values, vectors = torch.linalg.eigh(gram)
    order = [-1, -2, -4]
    assert not topk.certify(gram, topk.Leading(values[order], vectors[:, order], 0))
    order = [-1, -2, -3]
    assert topk.certify(gram, topk.Leading(values[order], vectors[:, order], 0))


def test_filter_plan_costs_less_for_a_decaying_spectrum():
    flat, steep = (torch.linspace(4, 0, 4096).double() ** power for power in (1, 40))
    plans = [topk.plan_filter(values.tolist(), 64) for values in (flat, steep)]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[1].work < plans[0].work / 2


@pytest.mark.parametrize("kind", ["power", "bf16 merge", "rank deficient"])
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 400), (400, SIZE)], ids=str)
@pytest.mark.parametrize("only_top", [False, True])
def test_whole_path_equals_the_oracle(monkeypatch, kind, shape, only_top):
    monkeypatch.setattr(topk, "SMALLEST", 100)
    A = matrix_of(kind, *shape)
    u, s, vh = oracle(A)
    spectrum = solve(WeightDelta.from_tensor("a", A), top=K, only_top=only_top)
    assert spectrum.method == (GRAM_CERTIFIED if only_top else GRAM_FILTER).name
    assert len(spectrum.S) == (K if only_top else SIZE)
    assert abs(spectrum.S - s.numpy()[: len(spectrum.S)]).max() <= 1e-7 * float(s[0])
    rank = 4 if kind == "bf16 merge" else K
    assert angle(u[:, :K], torch.from_numpy(spectrum.U)[:, :rank]) <= 1e-5
    assert angle(vh[:K].T, torch.from_numpy(spectrum.Vh).T[:, :rank]) <= 1e-5


def test_what_the_filter_leaves_goes_to_the_full_solver_and_is_recorded(monkeypatch):
    monkeypatch.setattr(topk, "SMALLEST", 100)
    values = torch.ones(SIZE).double()
    values[:K] += 1e-6
    spectrum = solve(WeightDelta.from_tensor("a", torch.diag(values)), top=K)
    assert spectrum.status == "ok"
    assert spectrum.method.startswith(f"{GRAM_FILTER.name} gave up (")
    assert spectrum.method.endswith(f"; then {GRAM_EIGH.name}")


def test_the_same_input_gives_the_same_bits(grams):
    runs = [topk.leading_eigenvectors(grams["gaussian"], K).vectors for _ in range(2)]
    assert torch.equal(*runs)
