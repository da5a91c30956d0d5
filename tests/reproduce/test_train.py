"""Runs: killed and undisturbed ones end alike, and what they save is what the toolkit reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reproduce.tiny import WORDNET, tiny_model
from safetensors.torch import load_file

import spectra
from spectra.cli import main
from spectra.errors import StoreError
from spectra.reproduce import methods
from spectra.reproduce.base import load_model
from spectra.reproduce.batches import tokenise
from spectra.reproduce.methods import Method, attach
from spectra.reproduce.plan import FULL, QUICK, Run
from spectra.reproduce.tasks import mix
from spectra.reproduce.train import order, snapshot, train
from spectra.reproduce.wordnet import read_wordnet
from spectra.training import merge_adapter

PLAN = replace(QUICK, steps=5, early=2, held_out=2, r=2)
METHODS = {
    "full": Method("full"),
    "lora": Method("lora", 6),
    "multilora": Method("multilora", 2, 3),
    "rlora": Method("rlora", 6, 3),
    "multihead": Method("multihead", 6, 3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data():
    return mix(5, 2, read_wordnet(WORDNET))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


class KilledError(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_ends_like_an_undisturbed_one(name, base, data, tmp_path):
    run = Run(name, METHODS[name], 1e-3, 5)
    whole = train(run, PLAN, base, data, tmp_path / "whole")

    def kill(step, loss):
        if step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train(run, PLAN, base, data, tmp_path / "killed", progress=kill)
    again: list[int] = []
    resumed = train(run, PLAN, base, data, tmp_path / "killed", progress=lambda step, loss: again.append(step))
    assert again == [3, 4, 5]  # from the checkpoint of step 2
    assert resumed["scores"] == whole["scores"]
    for step in (2, 5):
        first, second = (weights(snapshot(tmp_path / kind, run, step)) for kind in ("whole", "killed"))
        assert first
        assert all(torch.equal(first[key], second[key]) for key in first)
    log = (tmp_path / "killed" / "runs" / name / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["step", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "multihead"])  # its router has no one ΔW
def test_what_is_saved_opens_and_is_merged_minus_base(name, base, tmp_path):
    before = load_model(base, "cpu")[0].state_dict()
    model = attach(load_model(base, "cpu")[0], METHODS[name])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    methods.save(model, METHODS[name], tmp_path / "saved")
    merge = {"full": lambda: model, "lora": lambda: model.merge_and_unload()}.get(name, lambda: merge_adapter(model))
    after = merge().state_dict()
    source = spectra.open_source(tmp_path / "saved", base).select("re:.*_proj.weight")
    assert source.kind == {"full": "checkpoint", "rlora": "multihead"}.get(name, name)
    assert len(source) == 14
    for delta in source:
        expected = after[delta.name].double() - before[delta.name].double()
        torch.testing.assert_close(delta.read().to_dense().double(), expected, rtol=0, atol=1e-6)


def test_training_lowers_the_loss(base, data, tmp_path):
    losses: list[float] = []
    run = Run("full", METHODS["full"], 1e-2, 5)
    result = train(run, PLAN, base, data, tmp_path, progress=lambda step, loss: losses.append(loss))
    means = [np.mean([task["loss"] for task in result["scores"][step].values()]) for step in ("2", "5")]
    assert means[1] < means[0]
    assert losses[-1] < losses[0]


def test_a_finished_run_is_not_done_again(base, data, tmp_path):
    run = Run("lora", METHODS["lora"], 1e-3, 2)
    first = train(run, PLAN, base, data, tmp_path)
    assert train(run, PLAN, base, data, tmp_path, progress=lambda step, loss: pytest.fail("trained again")) == first


def test_a_folder_of_other_settings_is_refused(base, data, tmp_path):
    run = Run("lora", METHODS["lora"], 1e-3, 2)
    train(run, PLAN, base, data, tmp_path)
    with pytest.raises(StoreError, match="other settings"):
        train(replace(run, lr=2e-3), PLAN, base, data, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_training_starts_at_the_base_model(name, base):
    """Every method's model gives the base's logits before the first step."""
    plain, _ = load_model(base, "cpu")
    adapted = attach(load_model(base, "cpu")[0], METHODS[name]).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, plain.eval()(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_batches_hold_every_task_equally_and_every_example_once(base, data):
    _, tokenizer = load_model(base, "cpu")
    tokens = tokenise(data[0], tokenizer)
    batches = order(tokens, 1, 0)
    assert [len({item.task for item in batch}) for batch in batches] == [12] * 5
    assert len({id(item) for batch in batches for item in batch}) == len(tokens)
    assert batches != order(tokens, 1, 1)
    assert batches == order(tokens, 1, 0)


def test_the_plans_compare_at_equal_rank_data_and_steps():
    runs = FULL.main_runs()
    assert len(runs) == 6
    assert len({run.steps for run in runs}) == 1
    ranks = {run.name: run.method.total_rank for run in runs}
    assert ranks["lora"] == ranks["multilora-n3"] == ranks["rlora"] == 36
    assert ranks["multilora-n5"] == 60
    assert {run.seed for run in runs if run.method.kind == "full"} == {0, 1}
    names = [run.name for run in [*runs, *FULL.sensitivity_runs()]]
    assert len(set(names)) == len(names)
    assert {run.steps for run in FULL.sensitivity_runs()} == {FULL.early, FULL.steps}
    assert not QUICK.sensitivity_runs()


def test_the_help_names_the_plans_defaults():
    options = {option.name: option.help for option in main.get_command(None, "reproduce").params}
    for name, default in (("steps", FULL.steps), ("batch", FULL.per_task), ("rank", FULL.r)):
        assert options[name].endswith(f"[default: {default}]")


def test_settings_are_kept_beside_the_weights(base, data, tmp_path):
    run = Run("lora", METHODS["lora"], 1e-3, 2)
    train(run, PLAN, base, data, tmp_path)
    kept = json.loads((tmp_path / "runs" / "lora" / "run.json").read_text())
    assert (kept["lr"], kept["method"]["r"], kept["per_task"]) == (1e-3, 6, 1)
