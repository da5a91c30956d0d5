"""The long experiment's numbers against their definitions, written slowly on merged − base."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from spectra.reproduce.base import load_causal
from spectra.reproduce.long.directions import against_base, along
from spectra.reproduce.long.measure import energy_shares, measure
from spectra.reproduce.long.page import at_loss, equal_loss
from spectra.reproduce.long.pairs import compare_runs, cosine, run_pairs
from spectra.reproduce.long.plan import LONG, LongPlan
from spectra.reproduce.long.train import base_of, snapshot, train_base, train_run
from spectra.training import load_adapter, merge_adapter

PLAN = LongPlan(base_steps=3, steps=8, first=4, r=2, n=2, per_task=1, held_out=8, hidden=32, layers=1)
RUNS = {run.name: run for run in PLAN.runs()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    train_base(PLAN, folder)
    for name in ("lora", "multilora", "multilora-scaling", "rlora", "full", "full-2"):
        train_run(RUNS[name], PLAN, folder)
    return folder


def projections(model):
    return {
        name: tensor.double().numpy() for name, tensor in model.state_dict().items() if name.endswith("proj.weight")
    }


def adapted(directory, name, step):
    return load_adapter(load_causal(base_of(directory, PLAN), "cpu"), snapshot(directory, name, step))


def update(directory, name, step=8):
    before = projections(load_causal(base_of(directory, PLAN), "cpu"))
    folder = snapshot(directory, name, step)
    after = (
        projections(load_causal(folder, "cpu")) if name.startswith("full")
        else projections(merge_adapter(adapted(directory, name, step)))
    )  # fmt: skip
    return {key: after[key] - before[key] for key in before}


def slowly(matrix):
    energy = np.linalg.svd(matrix)[1] ** 2
    energy /= energy.sum()
    rank = next(k for k in range(1, len(energy) + 1) if energy[:k].sum() >= 0.9)
    return energy[0], rank


@pytest.mark.parametrize("name", ["multilora", "rlora", "full"])
def test_the_spectrum_is_that_of_merged_minus_base(directory, name):
    table = measure(RUNS[name], 8, PLAN, directory).set_index("name")
    expected = update(directory, name)
    assert set(table.index) == set(expected)
    assert len(table) == 7
    for key, matrix in expected.items():
        top, rank = slowly(matrix)
        assert table.loc[key, "top_1_share"] == pytest.approx(top, rel=1e-3)
        assert table.loc[key, "rank_90"] == rank


def test_multiloras_start_is_its_first_factors_under_the_trained_scaling(directory):
    table = measure(RUNS["multilora"], 8, PLAN, directory).set_index("name")
    first, last = (adapted(directory, "multilora", step).requires_grad_(False) for step in (0, 8))
    for key in table.index:
        path = key.removesuffix(".weight") + ".adapter"
        old, new = first.get_submodule(path), last.get_submodule(path)
        start = torch.zeros(new.out_features, new.in_features, dtype=torch.float64)
        whole = torch.zeros_like(start)
        for i in range(PLAN.n):
            scaling = torch.diag(new.multilora_scaling[i].double())
            start += scaling @ old.multilora_B[i].double() @ old.multilora_A[i].double()
            whole += scaling @ new.multilora_B[i].double() @ new.multilora_A[i].double()
        share = float((start**2).sum() / (whole**2).sum())
        assert table.loc[key, "start_share"] == pytest.approx(share, rel=1e-4)
        top, rank = slowly((whole - start).numpy())
        assert table.loc[key, "learned_top_1_share"] == pytest.approx(top, rel=1e-3)
        assert table.loc[key, "learned_rank_90"] == rank
        moved = float((new.multilora_A - old.multilora_A).norm() / old.multilora_A.norm())
        assert table.loc[key, "drift_A"] == pytest.approx(moved, rel=1e-4)
        assert table.loc[key, "in_start_right_chance"] == pytest.approx(4 / new.in_features)


def test_what_has_no_value_has_none(directory):
    scaling = measure(RUNS["multilora-scaling"], 8, PLAN, directory)
    assert scaling["start_share"].tolist() == pytest.approx([1.0] * 7)
    assert scaling["in_start_left"].tolist() == pytest.approx([1.0] * 7)
    assert (scaling[["drift_A", "drift_B"]] == 0).all().all()
    assert scaling["learned_rank_90"].isna().all()
    lora = measure(RUNS["lora"], 8, PLAN, directory)
    assert (lora["start_share"] == 0).all()
    assert lora[["drift_B", "in_start_left"]].isna().all().all()
    assert lora["learned_rank_90"].equals(lora["rank_90"])
    assert measure(RUNS["full"], 8, PLAN, directory)[["start_share", "drift_A"]].isna().all().all()


def test_energy_shares_add_up_to_one(directory):
    shares = energy_shares(RUNS["multilora"], 8, PLAN, directory)
    sums = shares.groupby("part")["share"].sum()
    assert set(sums.index) == {"update", "start", "learned"}
    assert sums.tolist() == pytest.approx([1.0] * 3)
    longest = shares.groupby("part")["index"].max()
    assert longest.to_dict() == {"update": 4, "start": 4, "learned": 8}


def test_agreement_is_what_its_definition_says(directory):
    table = compare_runs(RUNS["full-2"], RUNS["full"], 8, PLAN, directory).set_index("name")
    first, second = update(directory, "full-2"), update(directory, "full")
    for key in table.index:
        U, S, Vh = np.linalg.svd(first[key])
        other_U, other_S, other_Vh = np.linalg.svd(second[key])
        row = table.loc[key]
        k = len(S)
        captured = sum(S[i] ** 2 * np.sum((other_U[:, :12].T @ U[:, i]) ** 2) for i in range(k)) / np.sum(S**2)
        assert row["captured_left"] == pytest.approx(captured, rel=1e-3)
        captured = sum(S[i] ** 2 * np.sum((other_Vh[:12] @ Vh[i]) ** 2) for i in range(k)) / np.sum(S**2)
        assert row["captured_right"] == pytest.approx(captured, rel=1e-3)
        assert row["phi_left"] == pytest.approx(np.sum((other_U[:, :12].T @ U[:, :12]) ** 2) / 12, rel=1e-3)
        tails = [(U[:, 12:k] * S[12:]) @ Vh[12:k], (other_U[:, 12:k] * other_S[12:]) @ other_Vh[12:k]]
        assert row["tail_cosine"] == pytest.approx(cosine(*tails), abs=1e-3)
        assert row["cosine"] == pytest.approx(cosine(first[key], second[key]), abs=1e-4)
        assert row["chance_left"] == pytest.approx(12 / len(U))


def test_a_run_is_the_same_as_itself_and_adapters_have_no_tail(directory):
    table = compare_runs(RUNS["lora"], RUNS["lora"], 8, PLAN, directory)
    for column in ("cosine", "captured_left", "captured_right", "phi_left", "phi_1_right"):
        assert table[column].tolist() == pytest.approx([1.0] * 7), column
    assert table["tail_cosine"].isna().all()


def test_every_run_is_compared_to_one_that_shares_its_data_and_to_one_that_does_not():
    pairs = run_pairs(LONG)
    adapters = [run.name for run in LONG.runs() if run.method.kind != "full"]
    for name in adapters:
        shared = {b.data_seed == a.data_seed for a, b in pairs if a.name == name and b.name in ("full", "full-2")}
        assert shared == {True, False}
    assert ("full-2", "full") in [(a.name, b.name) for a, b in pairs]


def test_equal_loss_is_found_between_snapshots():
    columns = dict.fromkeys(
        ("relative_norm", "top_1_share", "effective_rank", "start_share", "learned_top_1_share", "learned_rank_90",
         "drift_A", "drift_B"), 0.0,
    )  # fmt: skip
    rows = [
        {"run": run, "step": step, "loss": loss, "rank_90": rank, **columns}
        for run, points in {
            "lora": [(100, 0.8, 10.0), (400, 0.4, 2.0)],
            "multilora": [(100, 0.9, 12.0), (400, 0.6, 6.0)],
            "full": [(100, 0.5, 30.0), (400, 0.2, 40.0)],
            "slow": [(100, 0.9, 1.0)],
        }.items()
        for step, loss, rank in points
    ]
    table = pd.DataFrame(rows)
    assert equal_loss(table) == 0.6
    found = at_loss(table, 0.6).set_index("run")
    assert list(found.index) == ["lora", "multilora", "full"]
    assert found.loc["lora", ["step", "rank_90"]].tolist() == pytest.approx([200, 6.0])  # halfway in log(step)
    assert found.loc["full", "step"] == 100
    assert equal_loss(table[table["run"] != "full"]) is None


def test_the_directions_are_what_their_definitions_say_of_merged_minus_base(directory):
    """Intruders and energies by all vectors of W₀; MultiLoRA's modules as heads."""
    run = RUNS["multilora"]
    (row,) = against_base(run, 8, PLAN, directory).to_dict("records")
    base = projections(load_causal(base_of(directory, PLAN), "cpu"))
    changes = update(directory, "multilora")
    intruders, left, right = [], [], []
    for key, W in base.items():
        U, _, Vh = np.linalg.svd(W, full_matrices=False)
        Y = np.linalg.svd(W + changes[key], full_matrices=False)[0][:, :10]
        intruders.append((np.abs(U.T @ Y).max(0) < 0.5).sum())
        size = np.linalg.norm(changes[key])
        left.append((np.linalg.norm(U[:, :10].T @ changes[key]) / size) ** 2)
        right.append((np.linalg.norm(changes[key] @ Vh[:10].T) / size) ** 2)
    assert row["intruders"] == pytest.approx(np.mean(intruders))
    assert row["left_in_top"] == pytest.approx(np.mean(left), rel=1e-3)
    assert row["right_in_top"] == pytest.approx(np.mean(right), rel=1e-3)
    assert -1 <= row["head_cosine"] <= 1
    (full,) = against_base(RUNS["full"], 8, PLAN, directory).to_dict("records")
    assert np.isnan(full["head_cosine"])
    assert full["intruders"] <= full["intruders_chance"] <= 10


def test_what_stays_until_the_end_is_phi_to_the_last_snapshot(directory):
    table = along(RUNS["full"], [4, 8], PLAN, directory).set_index("step")
    assert table.loc[8, "phi_to_last"] == pytest.approx(1)
    first, last = update(directory, "full", 4), update(directory, "full", 8)
    shared = []
    for key in first:
        U, V = (np.linalg.svd(change[key])[0][:, :10] for change in (first, last))
        shared.append(np.linalg.norm(U.T @ V) ** 2 / 10)
    assert table.loc[4, "phi_to_last"] == pytest.approx(np.mean(shared), rel=1e-3)
    assert table.loc[8, "phi_to_previous"] == pytest.approx(np.mean(shared), rel=1e-3)
    assert np.isnan(table.loc[4, "phi_to_previous"])
