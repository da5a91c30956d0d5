"""Runs of the long experiment: killed and undisturbed ones end alike, and each seed decides what it is said to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectra.errors import StoreError
from spectra.reproduce.long import train
from spectra.reproduce.long.plan import LONG, QUICK_LONG, LongPlan
from spectra.reproduce.long.train import losses_of, run_folder, snapshot, train_base, train_run

PLAN = LongPlan(base_steps=3, steps=6, first=2, r=2, n=2, per_task=1, held_out=8, hidden=32, layers=1)
RUNS = {run.name: run for run in PLAN.runs()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    train_base(PLAN, folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


class KilledError(Exception):
    pass


def killed_at(monkeypatch, step):
    """Training ends without warning when it asks for this step's batch."""
    right = train.training_batch

    def batch(pairs, seed, at):
        if at == step:
            raise KilledError
        return right(pairs, seed, at)

    monkeypatch.setattr(train, "training_batch", batch)


@pytest.mark.parametrize("name", ["lora", "multilora", "multilora-scaling", "rlora", "full", "full-sgd"])
def test_a_killed_run_ends_like_an_undisturbed_one(name, directory, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "base").symlink_to(run_folder(directory, "base"))
    train_run(RUNS[name], PLAN, directory)
    monkeypatch.setattr(train, "KEEP_EVERY", 0.0)
    with monkeypatch.context() as patched:
        killed_at(patched, 5)
        with pytest.raises(KilledError):
            train_run(RUNS[name], PLAN, tmp_path)
    asked: list[int] = []
    right = train.training_batch
    monkeypatch.setattr(train, "training_batch", lambda pairs, seed, at: asked.append(at) or right(pairs, seed, at))
    train_run(RUNS[name], PLAN, tmp_path)
    assert asked == [5]
    for step in PLAN.snapshots:
        first, second = (weights(snapshot(place, name, step)) for place in (directory, tmp_path))
        assert first
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert losses_of(tmp_path, name, step).is_file()
    logs = [(run_folder(place, name) / "log.csv").read_text() for place in (directory, tmp_path)]
    assert logs[0] == logs[1]
    train_run(RUNS[name], PLAN, tmp_path)
    assert asked == [5], "a finished run is not done again"


def test_other_settings_are_refused(directory):
    train_run(RUNS["lora"], PLAN, directory)
    with pytest.raises(StoreError, match="other settings"):
        train_run(replace(RUNS["lora"], lr=2e-3), PLAN, directory)


def test_the_two_seeds_decide_one_thing_each(directory, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    right = train.training_batch
    for name, seeds in {"a": (0, 0), "b": (1, 0), "c": (0, 1)}.items():
        run = replace(RUNS["multilora"], name=name, init_seed=seeds[0], data_seed=seeds[1])
        kept = seen[name] = []
        monkeypatch.setattr(
            train, "training_batch", lambda pairs, seed, at, kept=kept: kept.append(right(pairs, seed, at)) or kept[-1]
        )
        train_run(run, PLAN, directory)
    starts = {name: weights(snapshot(directory, name, 0)) for name in seen}
    key = next(name for name in starts["a"] if name.endswith("multilora_A"))
    assert torch.equal(starts["a"][key], starts["c"][key])
    assert not torch.equal(starts["a"][key], starts["b"][key])
    assert all(map(torch.equal, seen["a"], seen["b"]))
    assert not torch.equal(seen["a"][0], seen["c"][0])


def test_scaling_alone_leaves_the_factors_as_they_started(directory):
    train_run(RUNS["multilora-scaling"], PLAN, directory)
    first, last = (weights(snapshot(directory, "multilora-scaling", step)) for step in (0, 6))
    for name, tensor in first.items():
        assert torch.equal(tensor, last[name]) != name.endswith("scaling")


def test_the_plan_is_the_protocol():
    runs = {run.name: run for run in LONG.runs()}
    assert len(runs) == 12
    assert replace(runs["lora-fast"], name="lora", lr=1e-3) == runs["lora"]
    assert LONG.snapshots == [0, 50, 100, 200, 400, 800, 1600, 3200, 6400]
    assert {run.steps for run in runs.values()} == {6400}
    assert list(runs)[:3] == ["lora", "multilora", "full"]
    assert {run.method.total_rank for run in runs.values()} == {12, None}
    for name in ("lora", "multilora", "rlora", "full"):
        again = runs[f"{name}-2"]
        assert (again.init_seed, again.data_seed) == (1, 1)
        assert replace(again, name=name, init_seed=0, data_seed=0) == runs[name]
    assert QUICK_LONG.runs()[0].steps < 100
