"""The engine on a card that hides no mistake (support.card): forms, rungs, batches, memory, streams."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from support.card import CardError, CardTensor, card_of
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.spectra_kinds import KINDS, matrix_of, oracle

import spectra
from spectra.deltas import edges, forms, recipes
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Kronecker
from spectra.engine.costs import needed
from spectra.engine.devices import Cuda
from spectra.engine.executors import device as batch_module
from spectra.engine.schedule import batches, plan
from spectra.engine.solve import solve
from spectra.engine.solvers import dense, factored, kronecker, topk

A = matrix_of("gaussian", 30, 20)


def _dense(count, rows=24, columns=30):
    return [WeightDelta.from_tensor(f"d{i}", matrix_of("gaussian", rows, columns, i)) for i in range(count)]


def _factored(count, width=3):
    pairs = [(matrix_of("power", 24, width, i), matrix_of("power", width, 30, i)) for i in range(count)]
    return [WeightDelta.from_factors(f"f{i}", left, right) for i, (left, right) in enumerate(pairs)]


class _Sides:
    """A recipe of a Kronecker product."""

    factored, refs, form = True, (), Kronecker

    def __init__(self, seed):
        self.sides = matrix_of("gaussian", 4, 6, seed), matrix_of("gaussian", 6, 5, seed)

    def read(self, device="cpu"):
        return Kronecker(*(side.to(device) for side in self.sides))


def _kronecker(count):
    return [WeightDelta(f"k{i}", (24, 30), _Sides(i), 20) for i in range(count)]


def _on_card(deltas, card, **options):
    """The results in the deltas' order, after everything that a card holds against the run."""
    found = {spectrum.name: spectrum for spectrum in spectra.decompose(deltas, device="cuda", **options)}
    assert card.misuses == []
    assert card.used == 0
    return [found[delta.name] for delta in deltas]


# The double itself: a mistake is refused, or told.


def test_the_card_refuses_what_a_card_refuses(monkeypatch):
    with card_of(monkeypatch, capacity=20_000) as card:
        there, here = A.to("cuda"), A.clone()
        assert (there.device, there.is_cuda, there.shape, type(there.mT)) == (
            torch.device("cuda:0"),
            True,
            A.shape,
            CardTensor,
        )
        assert torch.equal((there @ there.mT).cpu(), here @ here.mT)
        for mistake in (
            lambda: there @ here.mT,
            lambda: torch.stack([there, here]),
            lambda: there.add_(here),
            lambda: there.numpy(),
            lambda: np.asarray(there),
            lambda: torch.eye(20, dtype=torch.float64) @ there.mT,
        ):
            with pytest.raises(CardError):
                mistake()
        there *= 2  # nothing of it is the CPU's
        assert torch.equal(here, A)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(4000, dtype=torch.float64, device="cuda")
        assert card.used == A.nbytes
        del there
        assert card.used == 0


def test_the_card_tells_apart_its_streams(monkeypatch):
    device = Cuda("cuda:0")
    with card_of(monkeypatch) as card:
        with device.reading() as finish:
            early = A.to("cuda")
            finish()
            late = A.to("cuda")
        assert float(early.sum()) == float(A.sum())
        with pytest.raises(CardError, match="may still be writing"):
            late.sum()
        finish()
        assert float(late.sum()) == float(A.sum())
        del early
        assert "freed while {'main'} may still use it" in card.misuses[-1]
        card.misuses.clear()
        device.hand_over([late])
        del late
        assert card.misuses == []


def test_the_card_counts_transfers_and_waits(monkeypatch):
    with card_of(monkeypatch) as card:
        there = torch.ones(3, 2, dtype=torch.bfloat16).to("cuda").to(torch.float64)
        float(there.sum()), bool(there.any()), there.cpu()
        assert (card.counts["uploads"], card.uploaded, card.counts["downloads"], card.counts["waits"]) == (1, 12, 1, 3)


# The engine on it.


@pytest.mark.parametrize(("top", "only_top"), [(None, False), (4, False), (4, True)])
@pytest.mark.parametrize("budget", [2**17, 2**20, 2**30], ids=["one by one", "a few", "all at once"])
def test_every_form_and_kind_gives_what_the_cpu_gives(monkeypatch, top, only_top, budget):
    deltas = [WeightDelta.from_tensor(f"{kind}{i}", matrix_of(kind, 24, 30, i)) for kind in KINDS for i in range(2)]
    deltas += [*_factored(3), *_kronecker(3), WeightDelta.refused("r", (3, 3), "unsupported", "why")]
    nan = A.clone()
    nan[3, 4] = math.nan
    deltas += [WeightDelta.from_tensor("nan", nan), WeightDelta.from_tensor("tiny", 1e-200 * A)]
    with card_of(monkeypatch) as card:
        found = _on_card(deltas, card, top=top, only_top=only_top, memory_budget=budget)
    for delta, spectrum in zip(deltas, found, strict=True):
        alone = solve(delta, top=top, only_top=only_top)
        assert (spectrum.status, spectrum.method, spectrum.reason, spectrum.k) == (
            alone.status, alone.method, alone.reason, alone.k
        )  # fmt: skip
        assert pytest.approx(alone.S, abs=1e-7 * max(alone.S, default=0)) == spectrum.S
        assert {dtype for _, dtype, _ in card.solved} == {torch.float64}  # eigh in float32: pytorch issue 105359
        for array in (spectrum.S, spectrum.U, spectrum.Vh):
            assert array is None or type(array) is np.ndarray


def _raising(*_, **__):
    raise topk.NotConvergedError("not this one")


@pytest.mark.parametrize(
    ("make", "top", "only_top", "failing", "expected"),
    [
        (_dense, None, False, [(dense, "gram_values")], "svd-f64"),
        (_dense, 3, False, [(dense, "gram_top")], "gram-lanczos-f64"),
        (_dense, 3, True, [(dense, "gram_top")], "gram-lanczos-certified-f64"),
        (_dense, 3, False, [(dense, "gram_top"), (dense, "lanczos_top")], "svd-f64"),
        (_factored, 3, False, [(factored, "cholesky")], "qr-core-svd-f64"),
        (_factored, None, False, [(factored, "cholesky")], "qr-core-svd-f64"),
        (_factored, 3, False, [(factored, "factored_svd")], "product-svd-f64"),
        (_kronecker, None, False, [(kronecker, "kronecker_svd")], "product-svd-f64"),
        (_kronecker, 3, False, [(kronecker, "kronecker_svd")], "product-svd-f64"),
    ],
)
def test_every_rung_of_every_ladder(monkeypatch, make, top, only_top, failing, expected):
    monkeypatch.setattr(topk, "SMALLEST", 10)
    for module, name in failing:
        monkeypatch.setattr(module, name, _raising)
    deltas = make(3)
    if make is _dense:  # decaying, as Lanczos wants it
        kinds = [matrix_of("exponential", 160, 200, seed) for seed in range(3)]
        deltas = [WeightDelta.from_tensor(f"d{i}", matrix) for i, matrix in enumerate(kinds)]
    with card_of(monkeypatch) as card:
        found = _on_card(deltas, card, top=top, only_top=only_top)
    for delta, spectrum in zip(deltas, found, strict=True):
        assert spectrum.method.endswith(f"; then {expected}")
        S = oracle(delta.read().to_dense())[1].numpy()
        assert pytest.approx(S[: len(spectrum.S)], abs=1e-7 * S[0]) == spectrum.S
        if top:
            assert (np.abs(spectrum.U.T @ spectrum.U - np.eye(3)) < 1e-9).all()


@pytest.fixture
def pair(tmp_path):
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", nudged(base))
    write_checkpoint(tmp_path / "other", nudged(nudged(base)))
    return [spectra.open_source(tmp_path / name, tmp_path / "base") for name in ("tuned", "other")]


def test_what_is_compared_with_the_base_or_another_update(monkeypatch, pair):
    works = (
        lambda device: spectra.alignment(pair[0], k=3, device=device),
        lambda device: spectra.interference(pair, device=device),
        lambda device: spectra.summarize(spectra.decompose(pair[0], top=3, device=device)),
    )
    for work in works:
        expected = work("cpu").set_index("name").sort_index().select_dtypes("number")
        with card_of(monkeypatch) as card:
            found = work("cuda").set_index("name").sort_index().select_dtypes("number")
        assert (card.misuses, card.used) == ([], 0)
        assert card.counts["uploads"]
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


# Memory.


@pytest.mark.parametrize("make", [lambda: _dense(12, 20, 400), lambda: _dense(12, 60, 60), lambda: _factored(12)])
@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("times", [1, 2, 5, 16, 100])
def test_the_budget_holds(monkeypatch, make, top, times):
    monkeypatch.setattr(forms, "_BLOCK_ENTRIES", 64)  # what is there for some rows only is small beside a matrix
    deltas = make()
    budget = times * needed(deltas[0], top)
    with card_of(monkeypatch) as card:
        found = _on_card(deltas, card, top=top, memory_budget=budget)
    assert {spectrum.status for spectrum in found} == {"ok"}
    assert card.peak <= budget
    if times >= 4:  # there is room to read while another is at work
        assert all(batch.ahead for batch in batches(deltas, plan(deltas, budget, top)))


def test_tensors_in_memory_travel_in_their_own_type(monkeypatch):
    deltas = [WeightDelta.from_tensor("a", A.bfloat16()), WeightDelta.from_factors("b", A[:, :2].half(), A[:2].half())]
    with card_of(monkeypatch) as card:
        for delta in deltas:
            assert delta.read("cuda").tensors[0].dtype == torch.float64
        assert card.uploaded == 2 * (30 * 20 + 30 * 2 + 2 * 20)


def test_the_budget_holds_for_stored_weights(monkeypatch, pair):
    for module in (forms, recipes):
        monkeypatch.setattr(module, "_BLOCK_ENTRIES", 64)
    monkeypatch.setattr(edges, "BLOCK_ENTRIES", 64)
    deltas = pair[0].select("mlp.*").deltas
    for times in (2, 6):
        budget = times * max(needed(delta, 3) for delta in deltas)
        with card_of(monkeypatch) as card:
            _on_card(deltas, card, top=3, memory_budget=budget)
        assert card.peak <= budget


def _halves(spectrum):
    return "halved for want of memory" in spectrum.method


def test_a_batch_that_is_too_large_is_halved(monkeypatch):
    deltas = _dense(8, 40, 40)
    with card_of(monkeypatch, capacity=20 * 40 * 40 * 8) as card:
        found = _on_card(deltas, card, memory_budget=2**30)
    assert {spectrum.status for spectrum in found} == {"ok"}
    assert all(map(_halves, found))
    assert card.counts["empty_cache"] >= 1


@pytest.mark.parametrize("top", [None, 3])
def test_what_has_no_room_beside_others_is_done_alone(monkeypatch, top):
    """Read with seven others, the card is full before anything is solved."""
    deltas = _dense(8, 40, 40)
    with card_of(monkeypatch, capacity=7 * 40 * 40 * 8) as card:
        found = _on_card(deltas, card, top=top, memory_budget=2**30)
    first = "gram-eigh-f64" if top else "gram-eigvals-f64"
    assert {spectrum.method for spectrum in found} == {f"memory ran out beside others; then {first}"}


def test_what_has_no_room_alone_is_too_large_and_costs_no_other(monkeypatch):
    deltas = [*_dense(3, 10, 12), *[WeightDelta.from_tensor("large", matrix_of("gaussian", 90, 90))], *_factored(2)]
    with card_of(monkeypatch, capacity=90 * 90 * 12) as card:
        found = _on_card(deltas, card, memory_budget=2**30)
    assert [spectrum.status for spectrum in found] == ["ok"] * 3 + ["too_large"] + ["ok"] * 2
    assert "memory ran out on cuda" in found[3].reason


@pytest.mark.parametrize(
    "said", ["CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "CUSOLVER_STATUS_ALLOC_FAILED"]
)
def test_memory_that_a_library_lacks_counts_as_such(monkeypatch, said):
    def lacking(right, matrix, *rest, **options):
        if matrix.dim() == 3:
            raise RuntimeError(f"CUDA error: {said}")
        return right(matrix, *rest, **options)

    with card_of(monkeypatch, faults={"linalg_eigvalsh": lacking}) as card:
        found = _on_card(_dense(2), card)
    assert all(map(_halves, found))


# Streams and transfers.


@pytest.mark.parametrize("careless", ["finish", "hand_over"])
def test_the_reader_waits_and_hands_over_or_the_card_tells(monkeypatch, careless):
    """What the two lines are for: without either, the double finds the mistake."""
    if careless == "hand_over":
        monkeypatch.setattr(Cuda, "hand_over", lambda *_: None)
    else:
        read = batch_module.read
        monkeypatch.setattr(batch_module, "read", lambda delta, name, finish: read(delta, name))
    with card_of(monkeypatch) as card:
        try:
            list(spectra.decompose(_dense(4), device="cuda"))
        except CardError:
            assert careless == "finish"
    assert card.misuses


def test_the_next_batch_is_read_while_one_is_at_work(monkeypatch):
    deltas = _dense(6)
    solve_forms, seen = batch_module.solve_forms, []

    def solving(members, read, wanted):
        deadline = time.monotonic() + 20
        while len(card.held) < 4 and members[0].name != "d4" and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(len(card.held))
        return solve_forms(members, read, wanted)

    monkeypatch.setattr(batch_module, "solve_forms", solving)
    with card_of(monkeypatch) as card:
        _on_card(deltas, card, memory_budget=4 * (needed(deltas[0], None) + 8 * 24 * 30))
    assert seen == [4, 4, 2]


def test_stored_weights_travel_once_and_as_they_are_stored(monkeypatch, tmp_path):
    """Waits and downloads do not grow with a matrix' size: on a card each of them stops the reader or the solver."""
    monkeypatch.setattr(recipes, "_BLOCK_ENTRIES", 64)
    monkeypatch.setattr(edges, "BLOCK_ENTRIES", 64)
    counts = {}
    for size in (160, 224):
        name = "model.layers.0.mlp.up_proj.weight"
        base = {name: (0.02 * matrix_of("gaussian", size, size)).bfloat16()}
        tuned = {name: (base[name] + 0.1 * matrix_of("gaussian", size, size, 1)).bfloat16()}
        paths = [write_checkpoint(tmp_path / f"{part}{size}", t) for part, t in (("base", base), ("tuned", tuned))]
        source = spectra.open_source(paths[1], paths[0])
        with card_of(monkeypatch) as card:
            _on_card(source.deltas, card, top=3)
        assert card.uploaded < 2 * 2 * size**2 + 2 * 8 * 3 * size  # two weights in bf16, and random signs
        counts[size] = {what: card.counts[what] for what in ("uploads", "downloads", "waits")}
    assert counts[160] == counts[224]
    assert counts[160]["downloads"] <= 17
    assert counts[160]["downloads"] + counts[160]["waits"] <= 49  # each of either stops it
