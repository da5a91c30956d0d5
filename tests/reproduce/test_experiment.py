"""`spectra reproduce --quick` as a user runs it, on a tiny model, and what it leaves."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from reproduce.tiny import GGUF, WORDNET, part_of_gguf, tiny_model
from safetensors.torch import load_file, save_file
from support.warm import Warm

import spectra
from spectra.errors import DeviceError, NotFoundError, SourceError, SpectraError, StoreError
from spectra.files.folder import open_folder
from spectra.reproduce import reproduce
from spectra.reproduce.base import load_model, prepare_base
from spectra.reproduce.commands import Commands
from spectra.reproduce.methods import Method, attach
from spectra.reproduce.origin import origin_of, save_origin
from spectra.reproduce.plan import FULL, QUICK, Run
from spectra.reproduce.remaining import Remaining, work, work_of_run
from spectra.reproduce.tasks import FAMILIES, mix
from spectra.reproduce.train import snapshot, train
from spectra.reproduce.wordnet import read_wordnet

SPECTRA = "from spectra.cli import main; main(prog_name='spectra')"
KILLED = f"""
import os, signal
from spectra.reproduce import train
right = train._step
def step(model, optimiser, trained, examples, run, step, device):
    if (run.name, step) == ("lora", 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return right(model, optimiser, trained, examples, run, step, device)
train._step = step
{SPECTRA}
"""


def words(base: Path, out: Path) -> list[str]:
    return ["reproduce", "--quick", "--base", str(base), "--wordnet", str(WORDNET), "--out", str(out)]


@pytest.fixture(scope="module")
def warm():
    with Warm("transformers.modeling_utils", "peft", "spectra.reproduce.experiment", "spectra.plots") as processes:
        yield processes


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, warm):
    """Killed once in the middle of the third run, behind its checkpoint, then run to its end by the same command."""
    folder = tmp_path_factory.mktemp("experiment")
    base = tiny_model(folder / "model")
    first = warm.run(KILLED, words(base, folder / "out"), into=folder / "first")
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert "run 3 of 6" in first.stderr
    kept = {path: path.stat().st_mtime for path in (folder / "out" / "runs").glob("*/result.json")}
    second = warm.run(SPECTRA, words(base, folder / "out"), into=folder / "second")
    assert second.returncode == 0, second.stderr
    return folder / "out", kept, second


def test_finished_runs_are_not_done_again(experiment):
    _, kept, _ = experiment
    assert len(kept) == 2
    assert all(path.stat().st_mtime == before for path, before in kept.items())


def test_it_says_what_it_does_and_where_the_figures_are(experiment, warm):
    out, _, done = experiment
    assert done.stdout == f"{out / 'figures'}\n"
    for line in ("run 1 of 6: full, 4 steps", "throughput and memory", "spectra and subspaces", "figures and tables"):
        assert line in done.stderr
    assert re.search(r"  step 4 of 4, loss [0-9.]+; about (a minute|[0-9]+ min) left\n", done.stderr)
    assert "Warning" not in warm.said + done.stderr
    assert "%|" not in done.stderr


def test_every_figure_stands_beside_its_numbers(experiment):
    figures = experiment[0] / "figures"
    for name, file in {
        "figure-1": "histogram",
        "figure-3": "cost",
        "figure-4-k_proj": "similarity",
        "figure-4-v_proj": "similarity",
        "figure-5-k_proj": "histogram",
        "figure-5-v_proj": "histogram",
    }.items():
        assert (figures / name / f"{file}.png").stat().st_size > 5_000
        numbers = next((figures / name).glob("*.csv"))
        assert len(pd.read_csv(numbers)) > 5, numbers


def test_a_recorded_command_makes_its_figure_again(experiment, warm, tmp_path):
    figures = experiment[0] / "figures"
    lines = (figures / "commands.sh").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"svd", "similarity", "alignment", "heads", "series", "plot"}
    numbers = figures / "figure-4-v_proj" / "similarity_grid.csv"
    before = numbers.read_bytes()
    numbers.unlink()
    program, *given = shlex.split(next(line for line in lines if "figure-4-v_proj" in line))
    assert program == "spectra"
    assert warm.run(SPECTRA, given, into=tmp_path / "again").returncode == 0
    assert numbers.read_bytes() == before


def test_the_tables_hold_what_the_results_hold(experiment):
    out, _, _ = experiment
    table = pd.read_csv(out / "figures" / "spectra.csv")
    trained = {"full", "full-seed1", "lora", "multilora-n3", "multilora-n5", "rlora"}
    assert set(table["run"]) == trained | {"multilora-n3-origin", "multilora-n5-origin"}
    one = table[(table["run"] == "lora") & (table["role"] == "v_proj") & (table["step"] == 4)].iloc[0]
    stored = [s for s in spectra.load(out / "spectra" / "lora-step-4") if s.role == "v_proj"]
    shares = [np.sum(s.S[:1] ** 2) / np.sum(s.S**2) for s in stored]
    assert one["top_1_share"] == pytest.approx(np.median(shares), rel=1e-4)
    assert one["max_rank"] == 12
    similar = pd.read_csv(out / "figures" / "similarity.csv")
    assert {"left", "right"} == set(similar["side"])
    assert similar["phi"].between(0, 1).all()
    tasks = pd.read_csv(out / "figures" / "tasks.csv")
    assert set(tasks["family"]) == set(FAMILIES)
    assert set(tasks["run"]) == trained | {"base"}
    costs = pd.read_csv(out / "figures" / "figure-3" / "cost.csv")
    assert (costs[["tokens_per_second", "peak_mib"]] > 0).all().all()
    assert {"lora", "multilora", "rlora", "multihead", "full"} == set(costs["kind"])


def test_alignment_heads_and_series_are_those_of_the_trained_weights(experiment):
    out, _, _ = experiment
    last = out / "runs" / "rlora" / "step-4"
    base = out.parent / "model"
    found = {name: pd.read_csv(out / "figures" / f"{name}.csv") for name in ("alignment", "heads", "series")}
    trained = {"full", "full-seed1", "lora", "multilora-n3", "multilora-n5", "rlora"}
    assert set(found["alignment"]["run"]) == set(found["series"]["run"]) == trained
    assert set(found["heads"]["run"]) == {"multilora-n3", "multilora-n5", "rlora"}
    of_v = {name: table.set_index(["run", "role"]).loc[("rlora", "v_proj")] for name, table in found.items()}
    against = spectra.alignment(spectra.open_source(last, base).select("v_proj"))
    assert of_v["alignment"]["intruders"] == pytest.approx(against["intruders"].mean(), rel=1e-4)
    assert of_v["alignment"]["left_in_top"] == pytest.approx(against["left_in_top"].mean(), rel=1e-4)
    heads = spectra.head_similarity(spectra.open_source(last, base, heads="each").select("v_proj"))
    assert of_v["heads"]["cosine"] == pytest.approx(heads["cosine"].mean(), rel=1e-4)
    assert of_v["series"]["phi_to_last"] == pytest.approx(1), "one step is the last one"
    made = (out / "figures" / "tables.md").read_text()
    for title in ("### Against the base", "### Heads and parallel modules", "### From step to step"):
        assert title in made


def test_the_origin_has_the_random_start_and_the_trained_scaling(tmp_path):
    base = tiny_model(tmp_path / "model")
    run = Run("multilora", Method("multilora", 2, 3), 1e-2, 2, seed=5)
    torch.manual_seed(run.seed)
    model = attach(load_model(base, "cpu")[0], run.method)
    start = {name.replace(".adapter.", "."): tensor for name, tensor in model.state_dict().items()}
    train(run, QUICK, base, mix(4, 2, read_wordnet(WORDNET)), tmp_path)
    save_origin(run, 2, base, tmp_path)
    made, trained = (
        load_file(next(folder.glob("*.safetensors")))
        for folder in (origin_of(tmp_path, run, 2), snapshot(tmp_path, run, 2))
    )
    assert made.keys() == trained.keys()
    for name, tensor in made.items():
        if name.endswith("scaling"):
            assert torch.equal(tensor, trained[name])
            assert tensor.abs().max() > 0
        else:
            assert not torch.equal(tensor, trained[name]), name
            assert torch.equal(tensor, start[name.removeprefix("base_model.model.")]), name


def test_the_first_layers_of_a_base_are_its_own(tmp_path):
    whole = tiny_model(tmp_path / "model")
    folder = prepare_base(whole, tmp_path / "out", layers=1)
    model, full = load_model(folder, "cpu")[0], load_file(whole / "model.safetensors")
    assert model.config.num_hidden_layers == 1
    kept = load_file(folder / "model.safetensors")
    assert {name for name in full if "layers.1." not in name} == set(kept)
    assert all(torch.equal(tensor, full[name]) for name, tensor in kept.items())
    assert prepare_base(whole, tmp_path / "out", layers=4).name == "base-4-layers"
    assert load_model(tmp_path / "out" / "base-4-layers", "cpu")[0].config.num_hidden_layers == 2


@pytest.mark.parametrize("plan", [QUICK, FULL], ids=["quick", "full"])
def test_what_is_left_is_nothing_when_all_parts_are_done(plan):
    """Every part that the experiment reports, in its order, by its weight: minutes as they are at that pace."""
    clock = iter(range(0, 10**6, 60))
    left = Remaining(work(plan), clock=lambda: next(clock))
    assert left.said == ""
    runs = [*plan.main_runs(), *plan.sensitivity_runs()]
    left.skip(work_of_run(runs[0], plan))
    half = sum(work_of_run(run, plan) for run in runs[1:])
    left.done(half)
    rest = work(plan) - work_of_run(runs[0], plan) - half
    minutes = rest / half
    assert left.said == ("; about a minute left" if minutes < 1.5 else f"; about {minutes:.0f} min left")
    left.done(rest)
    assert left.said == "; about a minute left"


def test_a_command_that_fails_says_its_own_message_and_the_next_one_runs(tmp_path):
    with Commands(lambda line: None) as commands:
        with pytest.raises(SpectraError, match=r"spectra plot \S+nothere failed: Error: \S+nothere does not exist"):
            commands.run("plot", tmp_path / "nothere")
        commands.run("--version")
        commands._process.kill()
        commands._process.wait()
        with pytest.raises(SpectraError, match="its process was ended"):
            commands.run("--version")


def test_a_missing_base_says_how_to_get_one(tmp_path):
    with pytest.raises(NotFoundError, match=r"neither a model's folder nor a GGUF file.*pip install"):
        prepare_base(tmp_path / "model.gguf", tmp_path)


def test_a_damaged_gguf_file_is_one_message(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(SourceError, match="cannot be dequantised"):
        prepare_base(tmp_path / "model.gguf", tmp_path)
    assert not (tmp_path / "base").exists()


def test_another_base_in_the_same_directory_is_refused(tmp_path):
    first, second = tiny_model(tmp_path / "a"), tiny_model(tmp_path / "b")
    assert prepare_base(first, tmp_path / "out") == first
    assert prepare_base(first, tmp_path / "out") == first
    weights = load_file(second / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, second / "model.safetensors")
    with pytest.raises(StoreError, match="started from another base"):
        prepare_base(second, tmp_path / "out")


@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"--device {device}"):
        reproduce(tmp_path / "out", QUICK, base=tmp_path, wordnet=WORDNET, pictures=tmp_path, device=device)
    assert not (tmp_path / "out").exists()


def test_a_missing_wordnet_ends_in_one_line(tmp_path):
    base = tiny_model(tmp_path / "model")
    given = [str(tmp_path) if word == str(WORDNET) else word for word in words(base, tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "spectra", *given], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_the_gguf_base_is_the_model_in_it(tmp_path):
    """Two layers of SmolLM2's 4-bit file: transformers' dequantised weights against the toolkit's own reading of it."""
    part = part_of_gguf(GGUF, tmp_path / "part.gguf", layers=(0, 29), tokens=1500)
    folder = prepare_base(part, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    source = spectra.open_source(folder, part)
    assert not source.coverage.tuned_only
    assert len(source) == 2 * 7 + 1
    for delta in source:
        difference = delta.read().to_dense()
        assert difference.abs().max() <= 1e-6 * weights[delta.name].abs().max()
    model, tokenizer = load_model(folder, "cpu")
    assert model.config.num_hidden_layers == 2
    assert tokenizer.decode(tokenizer("the first words of all").input_ids) == "the first words of all"


def test_the_toolkit_reads_a_gguf_base_as_transformers_reader_does(tmp_path):
    """Of the whole file, the layers that a part of it has by another reader."""
    whole = open_folder(GGUF).tensors
    part = open_folder(part_of_gguf(GGUF, tmp_path / "part.gguf", layers=(0, 29), tokens=1500)).tensors
    assert len(whole) == 30 * 9 + 2
    for new, old in enumerate((0, 29)):
        for role in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            here, there = (of[f"model.layers.{at}.{role}.weight"] for of, at in ((whole, old), (part, new)))
            assert torch.equal(here.read(), there.read())
