"""Block Lanczos against a full eigendecomposition, what it refuses, and the certificate."""

from __future__ import annotations

import pytest
import torch
from support.spectra_kinds import angle, matrix_of, oracle

from spectra.deltas.delta import WeightDelta
from spectra.engine.ladder import GRAM_CERTIFIED, GRAM_EIGH, GRAM_LANCZOS
from spectra.engine.solve import solve
from spectra.engine.solvers import calibration, dense, topk
from spectra.engine.solvers.lanczos import Krylov

SIZE, K = 320, 8
PLACE = torch.arange(SIZE).double()

# Eigenvalues that a Krylov space, a block of a few columns or a shift could stumble over, and k.
HARD = {
    "more copies than the block has columns": (torch.where(PLACE < 40, 1.0, 0.5 / (1 + PLACE)), 30),
    "copies on both sides of the cut": (torch.where(PLACE < 5, 3 - PLACE / 5, torch.where(PLACE < 45, 1.0, 0.01)), 25),
    "all equal": (torch.ones(SIZE), 20),
    "pairs": (1 / (1 + PLACE // 2), 15),
    "k is the rank": (torch.where(PLACE < 20, 20 - PLACE, 0.0), 20),
    "k is above the rank": (torch.where(PLACE < 20, 20 - PLACE, 0.0), 30),
    "rank one": (torch.where(PLACE < 1, 1.0, 0.0), 5),
    "huge range": (10 ** (-PLACE / 4), 40),
    "three that drown the rest": (torch.where(PLACE < 3, 1e10, 1 / (1 + PLACE)), 10),
    "dominant over a flat bulk": (torch.where(PLACE < 6, 1e6 * (6 - PLACE), 2 - PLACE / SIZE), 16),
    "a tight cluster": (torch.where(PLACE < 30, 1 + 1e-7 * (30 - PLACE), 0.5 - 0.4 * PLACE / SIZE), 30),
    "the cut in a tight cluster": (torch.where(PLACE < 30, 1 + 1e-7 * (30 - PLACE), 0.5 - 0.4 * PLACE / SIZE), 12),
    "no gap at all": (1 + 1e-9 * (SIZE - PLACE), 12),
    "a tiny gap": (torch.where(PLACE < K, 1 + 1e-6, 1.0), K),
}


def _with_eigenvalues(values):
    values = values.double()
    basis = torch.linalg.qr(torch.randn((SIZE, SIZE), generator=torch.Generator().manual_seed(1)).double()).Q
    gram = (basis * values) @ basis.T
    return (gram + gram.T) / 2, basis


@pytest.fixture
def patient(monkeypatch):
    """At these small sizes a full eigendecomposition is always cheaper: let that not count."""
    monkeypatch.setattr(topk, "SMALLEST", 100)
    monkeypatch.setattr(topk, "_MOST_SHARE", 1.0)
    monkeypatch.setattr(topk, "_MOST_WORK", 1e3)


@pytest.fixture(scope="module")
def grams():
    kinds = ("gaussian", "power", "exponential", "clustered", "rank deficient", "bf16 noise", "bf16 merge")
    return {kind: dense.gram(matrix_of(kind, SIZE, SIZE + 20)) for kind in kinds}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "power", "exponential", "rank deficient", "bf16 noise", "bf16 merge"])
def test_finds_the_leading_subspace(grams, kind, known, patient):
    gram = grams[kind]
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    found = topk.leading_eigenvectors(gram, K, values if known else None)
    assert torch.allclose(found.values, values[:K], rtol=1e-9)
    assert angle(vectors[:, :K], found.vectors) <= 1e-5
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(K).double(), atol=1e-10)
    assert topk.certify(gram, found)


@pytest.mark.parametrize("case", HARD)
def test_hard_spectra_are_exact_where_the_values_are_known(case, patient):
    exact, k = HARD[case]
    gram, basis = _with_eigenvalues(exact)
    values = calibration.eigenvalues(gram)
    found = topk.leading_eigenvectors(gram, k, values)
    largest, kth = float(values[0]), max(float(exact[k - 1]), 1e-14 * float(values[0]))
    gap = kth - float(exact[k])
    residual = (gram @ found.vectors - found.vectors * found.values).norm(dim=0).max()
    assert residual <= max(1e-6 * gap, 1e-10 * kth, 8e-14 * largest)
    assert (found.values - exact[:k]).abs().max() <= 1e-12 * largest
    assert (found.vectors.T @ found.vectors - torch.eye(k)).abs().max() <= 1e-12
    if gap > 1e-6 * largest:
        assert angle(basis[:, :k], found.vectors) <= 2e-6


@pytest.mark.parametrize("case", HARD)
def test_hard_spectra_are_certified_or_refused_where_the_values_are_not_known(case):
    exact, k = HARD[case]
    gram, _ = _with_eigenvalues(exact)
    try:
        found = topk.leading_eigenvectors(gram, k)
    except topk.NotConvergedError:
        return
    right = (found.values - exact[:k]).abs().max() <= 1e-9 * float(exact[0])
    assert topk.certify(gram, found) == right


def test_a_missed_copy_is_seen_by_the_known_values(monkeypatch, patient):
    monkeypatch.setattr(topk, "_largest_cluster", lambda *_: 1)
    monkeypatch.setattr(topk, "_WIDTH", 4)
    exact = torch.where(PLACE < 40, 1.0, 0.1 / (1 + PLACE))
    gram, _ = _with_eigenvalues(exact)
    try:
        found = topk.leading_eigenvectors(gram, 30, calibration.eigenvalues(gram))
    except topk.NotConvergedError:
        return
    assert (found.values - 1).abs().max() <= 1e-12


def test_a_shift_below_an_eigenvalue_is_refused():
    gram, _ = _with_eigenvalues(1 / (1 + PLACE))
    nothing = topk.Leading(gram.new_zeros(0), gram.new_zeros((SIZE, 0)), 0)
    with pytest.raises(topk.NotConvergedError, match=r"an eigenvalue above 9\.0"):
        topk._inverse(gram, 0.9, nothing)


def test_too_many_vectors_are_left_to_the_full_solver():
    with pytest.raises(topk.NotConvergedError, match="too many"):
        topk.leading_eigenvectors(torch.eye(100).double(), 30)


def test_values_that_never_get_there_are_left_to_the_full_solver():
    with pytest.raises(topk.NotConvergedError, match="as wanted"):
        topk.leading_eigenvectors(torch.diag(2 - PLACE / SIZE).double(), 40)


def test_certificate_sees_a_missed_value(grams):
    gram = grams["power"]
    values, vectors = torch.linalg.eigh(gram)
    order = [-1, -2, -4]
    assert not topk.certify(gram, topk.Leading(values[order], vectors[:, order], 0))
    order = [-1, -2, -3]
    assert topk.certify(gram, topk.Leading(values[order], vectors[:, order], 0))


def test_the_plan_fits_the_spectrum():
    def plan(values):
        return [(stage.start, stage.stop, stage.shift is not None) for stage in topk.plan_stages(values.tolist(), 64)]

    i = torch.arange(4096).double()
    assert plan(1 / (1 + i) ** 2) == [(0, 64, False)]
    assert plan(4 - i / 1024) == [(0, 64, True)]
    assert plan(torch.where(i < 16, 1e4 - i, 4 - i / 1024)) == [(0, 16, False), (16, 64, True)]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_predicted_dimension_is_about_right(power):
    size, k = 700, 12
    values = 1 / (1 + torch.arange(size).double()) ** power
    (stage,) = topk.plan_stages(values.tolist(), k)
    found = topk.leading_eigenvectors(torch.diag(values), k, values)
    assert 0.7 * stage.dimension <= found.columns - k <= 1.5 * stage.dimension


@pytest.mark.parametrize("rank", [2, 20, 60])
def test_a_krylov_space_of_a_matrix_of_low_rank_stays_orthonormal(rank):
    values = torch.where(rank > PLACE, 1.0 + PLACE, 0.0).double()
    start = torch.linalg.qr(torch.randn((SIZE, K), generator=torch.Generator().manual_seed(2)).double()).Q
    space = Krylov(lambda block: values[:, None] * block, start, 120)
    while not space.full:
        space.grow()
    found, coefficients, residuals = space.ritz(rank)
    basis = space.vectors(torch.eye(space.dimension).double())
    assert (basis.T @ basis - torch.eye(space.dimension)).abs().max() <= 1e-12
    assert torch.allclose(found, values.sort(descending=True).values[:rank], atol=1e-10)
    vectors = space.vectors(coefficients)
    assert (values[:, None] * vectors - vectors * found).norm(dim=0).max() <= residuals.max() + 1e-10


@pytest.mark.parametrize("kind", ["power", "bf16 merge", "rank deficient"])
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 400), (400, SIZE)], ids=str)
@pytest.mark.parametrize("only_top", [False, True])
def test_whole_path_equals_the_oracle(patient, kind, shape, only_top):
    A = matrix_of(kind, *shape)
    u, s, vh = oracle(A)
    spectrum = solve(WeightDelta.from_tensor("a", A), top=K, only_top=only_top)
    assert spectrum.method == (GRAM_CERTIFIED if only_top else GRAM_LANCZOS).name
    assert len(spectrum.S) == (K if only_top else SIZE)
    assert abs(spectrum.S - s.numpy()[: len(spectrum.S)]).max() <= 1e-7 * float(s[0])
    rank = 4 if kind == "bf16 merge" else K
    assert angle(u[:, :K], torch.from_numpy(spectrum.U)[:, :rank]) <= 1e-5
    assert angle(vh[:K].T, torch.from_numpy(spectrum.Vh).T[:, :rank]) <= 1e-5


@pytest.mark.parametrize("only_top", [False, True])
def test_what_lanczos_leaves_goes_to_the_full_solver_and_is_recorded(monkeypatch, only_top):
    monkeypatch.setattr(topk, "SMALLEST", 100)
    products = []
    gram = dense.gram
    monkeypatch.setattr(dense, "gram", lambda matrix, **options: products.append(1) or gram(matrix, **options))
    spectrum = solve(WeightDelta.from_tensor("a", torch.diag(2 - PLACE / SIZE)), top=40, only_top=only_top)
    assert spectrum.status == "ok"
    assert spectrum.method.startswith(f"{(GRAM_CERTIFIED if only_top else GRAM_LANCZOS).name} gave up (")
    assert spectrum.method.endswith(f"; then {GRAM_EIGH.name}")
    assert len(products) == 1  # the Gram matrix is not formed twice


def test_many_vectors_of_a_flat_spectrum_cost_no_eigenvalues_first(monkeypatch):
    monkeypatch.setattr(topk, "SMALLEST", 100)
    monkeypatch.setattr(dense, "eigenvalues", None)
    spectrum = solve(WeightDelta.from_tensor("a", torch.diag(2 - PLACE / SIZE)), top=40)
    assert spectrum.method == f"{GRAM_LANCZOS.name} gave up (40 vectors are too many for so flat a spectrum); " + (
        f"then {GRAM_EIGH.name}"
    )


def test_the_same_input_gives_the_same_bits(grams):
    gram = grams["power"]
    values = calibration.eigenvalues(gram)
    runs = [topk.leading_eigenvectors(gram, K, values).vectors for _ in range(2)]
    assert torch.equal(*runs)
