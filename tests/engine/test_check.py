"""Planted faults: whatever a solver gets wrong, the check says so, and the next solver's result is the one reported."""

from __future__ import annotations

import math

import pytest
import torch
from support.spectra_kinds import matrix_of, oracle

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Kronecker, LowRank
from spectra.engine import check
from spectra.engine.solve import solve
from spectra.engine.solvers import dense, factored, kronecker, topk


def kept(S, i, j, factor=1.2):
    """σᵢ times the factor, σⱼ so that Σσ² stays."""
    S = S.clone()
    rest = float(S[i].square() + S[j].square() - (factor * S[i]).square())
    S[i], S[j] = factor * S[i], math.sqrt(max(rest, 0.0))
    return S.sort(descending=True).values


def rescaled(S, wrong):
    """A wrong list with the right Σσ²."""
    return wrong * (S.norm() / wrong.norm())


FAULTS = {
    "a larger σ₁, a smaller σ₂": lambda S: kept(S, 0, 1, 1.05),
    "σ₁ off by a millionth, the rest right": lambda S: kept(S, 0, 1, 1 + 1e-6),
    "energy from the tail to the top": lambda S: kept(S, 0, len(S) // 2, 1.01),
    "two values swapped": lambda S: S[[1, 0, *range(2, len(S))]],
    "one value dropped": lambda S: S[1:],
    "one value dropped, the sum mended": lambda S: rescaled(S, S[1:]),
    "one value dropped, a zero instead": lambda S: rescaled(S, torch.cat([S[1:], S.new_zeros(1)])),
    "one value twice": lambda S: torch.cat([S[:1], S[:-1]]),
    "one value twice, the sum mended": lambda S: rescaled(S, torch.cat([S[:1], S[:-1]])),
    "one value too many": lambda S: torch.cat([S, S.new_zeros(1)]),
    "all equal": lambda S: torch.full_like(S, float(S.norm()) / math.sqrt(len(S))),
    "a power of the values": lambda S: rescaled(S, S**1.01),
    "rounded to float32": lambda S: rescaled(S, (S * (1 + 1e-7 * torch.arange(len(S)))).sort(descending=True).values),
    "negative": lambda S: -S.flip(0),
    "not a number": lambda S: S * math.nan,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["gaussian", "power"])
def test_a_planted_fault_in_the_values_is_caught(kind, fault, monkeypatch):
    A = matrix_of(kind, 40, 30)
    right = dense.gram_values
    monkeypatch.setattr(dense, "gram_values", lambda stack: torch.stack([FAULTS[fault](S) for S in right(stack)]))
    found = solve(WeightDelta.from_tensor("a", A))
    assert found.status == "ok"
    assert "gram-eigvals-f64 rejected (" in found.method
    assert found.method.endswith("then svd-f64")
    assert pytest.approx(oracle(A)[1].numpy()) == found.S


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "float32" not in fault])
@pytest.mark.parametrize("form", ["factors", "Kronecker"])
def test_a_planted_fault_in_the_values_of_a_product_is_caught(form, fault, monkeypatch):
    if form == "factors":
        room, name = factored, "factored_svd"
        ours = LowRank(matrix_of("gaussian", 40, 6), matrix_of("gaussian", 6, 30))
    else:
        room, name = kronecker, "kronecker_svd"
        ours = Kronecker(matrix_of("gaussian", 4, 3), matrix_of("gaussian", 5, 6))
    S = torch.linalg.svdvals(ours.to_dense())[: ours.max_rank]
    fourth = ours.fourth_moment
    assert check.value_fault(S, ours.norm, 0.0, fourth=fourth, count=ours.max_rank) == ""
    assert check.value_fault(FAULTS[fault](S), ours.norm, 0.0, fourth=fourth, count=ours.max_rank)
    assert fourth[0] == pytest.approx(float(S.pow(4).sum()), rel=1e-12)
    assert hasattr(room, name)


def halved(G):
    """The blocks beside the diagonal ones halved: the trace, and with it Σσ², stays."""
    G = G.clone()
    half = G.shape[-1] // 2
    G[..., :half, half:] /= 2
    G[..., half:, :half] /= 2
    return G


def shifted(G):
    """Energy moved along the diagonal."""
    G = G.clone()
    G[..., 0, 0] += 1
    G[..., 1, 1] -= 1
    return G


GRAMS = {
    "halved blocks": halved,
    "a missing block": lambda G: torch.block_diag(*(G[i : i + 10, i : i + 10] for i in range(0, G.shape[-1], 10))),
    "moved along the diagonal": shifted,
    "one entry": lambda G: G.index_put((torch.tensor([0, 3]), torch.tensor([3, 0])), G[0, 3].repeat(2) * 1.001),
    "two rows swapped": lambda G: G[[1, 0, *range(2, len(G))]][:, [0, 1, *range(2, len(G))]],
}


@pytest.mark.parametrize("top", [None, 4])
@pytest.mark.parametrize("fault", GRAMS)
@pytest.mark.parametrize("where", ["gram", "_by_halves"])
def test_a_planted_fault_in_the_gram_matrix_is_caught(where, fault, top, monkeypatch):
    A = matrix_of("gaussian", 40, 30) if where == "gram" else matrix_of("gaussian", 160, 120)  # not by halves if small
    right = getattr(dense, where)

    def planted(matrix, *_, **__):
        product = right(matrix, mirrored=True)
        return GRAMS[fault](product) if product.dim() == 2 else torch.stack([GRAMS[fault](one) for one in product])

    monkeypatch.setattr(dense, where, planted)
    found = solve(WeightDelta.from_tensor("a", A), top=top)
    said = "is not ‖ΔW·ΔWᵀ‖²" if where == "gram" else "is not the product of the matrix with its transpose"
    assert said in found.method or "Σσ²" in found.method
    assert found.method.endswith("then svd-f64")
    assert pytest.approx(oracle(A)[1].numpy()) == found.S


def test_a_planted_fault_is_caught_where_the_krylov_solver_runs(monkeypatch):
    A = matrix_of("power", 300, 300)
    monkeypatch.setattr(topk, "worthwhile", lambda size, top: True)
    right = dense.lanczos_top

    def lying(*arguments):
        S, U, Vh = right(*arguments)
        return torch.cat([S[:10], kept(S[10:], 0, 1, 1.01)]), U, Vh

    monkeypatch.setattr(dense, "lanczos_top", lying)
    found = solve(WeightDelta.from_tensor("a", A), top=4)
    assert "gram-lanczos-f64 rejected (" in found.method
    assert "gram-eigh-f64" in found.method


@pytest.mark.parametrize("scale", [1e-120, 1e-75, 1e-60, 1.0, 1e60, 1e100])
def test_right_values_pass_at_every_scale(scale):
    A = scale * matrix_of("power", 30, 20)
    assert solve(WeightDelta.from_tensor("a", A)).method == "gram-eigvals-f64"
    factors = WeightDelta.from_factors("a", A[:, :5], matrix_of("gaussian", 5, 12))
    assert solve(factors).method == "cholesky-qr2-core-svd-f64"


def test_factors_that_cancel_are_not_accused():
    L, R = matrix_of("gaussian", 30, 2), matrix_of("gaussian", 2, 20)
    for rest in (1e-2, 1e-5, 1e-8):
        both = WeightDelta.from_factors("a", torch.cat([L, -L], 1), torch.cat([R, R * (1 + rest)], 0))
        found = solve(both)
        assert found.status == "ok"
        assert "σ⁴" not in found.method
        assert found.S[:2] == pytest.approx(torch.linalg.svdvals(rest * L @ R)[:2].numpy(), rel=1e-6)


def test_the_fourth_moment_is_that_of_the_values():
    for shape in ((700, 300), (300, 700), (3, 2)):
        A = matrix_of("gaussian", *shape)
        expected = float(torch.linalg.svdvals(A).pow(4).sum())
        assert dense.fourth_moment(A)[0] == pytest.approx(expected, rel=1e-12)
        with dense.noted_moments() as moments:
            dense.gram_values(A)
        assert moments[0][0][0] == pytest.approx(expected, rel=1e-12)
    assert Dense(A).fourth_moment is None


@pytest.mark.parametrize("size", [2, 60, 384, 900])
def test_zeros_and_values_just_above_are_told_apart(size):
    """A constant matrix, signs and a projector show zeros below the resolution; just above it 3 % are kept."""
    torch.manual_seed(0)
    half = torch.linalg.qr(torch.randn(size, max(size // 2, 1), dtype=torch.float64)).Q
    signs = torch.randn(size, 1).sign() @ torch.randn(1, size).sign()
    for A, rank in ((torch.full((size, size), 0.3), 1), (signs, 1), (half @ half.T, half.shape[1])):
        found = solve(WeightDelta.from_tensor("a", A))
        assert found.method == "gram-eigvals-f64"
        assert found.rank == rank
    if size == 2:
        return
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    resolution = dense.GRAM_RESOLUTION * math.sqrt(size)
    S = torch.ones(size, dtype=torch.float64)
    S[-2:] = torch.tensor([1.05 * resolution, 0.0])
    found = solve(WeightDelta.from_tensor("a", (Q * S) @ Q.T))
    assert found.rank == size - 1
    assert found.S[-2] == pytest.approx(float(S[-2]), rel=0.03)
