"""Models on a server that are downloaded: the shards that are asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import run
from support.remote_models import ONE, SHARDS, assert_right, downloaded, larger, write_adapter_of

import spectra
from spectra.deltas.copies import at_home
from spectra.results import fingerprint


def test_download_takes_the_shards_of_the_chosen_matrices_into_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    code = "from spectra.cli import main; main()"
    command = [sys.executable, "-c", code, "svd", "org/tuned", "--base", "org/base", "--layer", "v_proj", "--download"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([*command, "--out", tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base").select("v_proj")
    shards = {part.path.removeprefix(f"{tmp_path}/") for delta in source for part in delta.refs}
    there = [file.relative_to(tmp_path / "cache") for file in (tmp_path / "cache").rglob("*.safetensors")]
    assert {f"{file.parts[0].rpartition('--')[2]}/{file.name}" for file in there} == shards
    assert len(shards) < 2 * SHARDS, "else this tells nothing"
    assert "missing" not in done.stdout + done.stderr
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    again = subprocess.run([*command, "--out", tmp_path / "out"], env=offline, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    found = {spectrum.name: spectrum for spectrum in spectra.load(tmp_path / "out")}
    assert_right(found, tmp_path)


WITH_SHARDS = {
    "extract": ("--base", "{0}/base", "--rank", "2", "--out", "{1}/lora"),
    "verify": ("--base", "{0}/base", "--adapter", "{0}/adapter", "--merged", "{0}/tuned", "--json"),
    "series": ("--step", "1", "--base", "{0}/base", "--no-figures", "--out", "{1}/series", "--json"),
}


@pytest.mark.parametrize("where", ["hub", "web"])
@pytest.mark.parametrize("name", WITH_SHARDS)
def test_a_download_takes_the_shards_of_the_chosen_matrices_and_gives_what_a_disk_gives(server, tmp_path, name, where):
    write_adapter_of(tmp_path / "adapter", tmp_path / "base")
    server.add("org/adapter", tmp_path / "adapter")
    for folder in ("base", "tuned", "adapter"):
        server.plain |= {f"/w/{folder}/{file.name}": file.read_bytes() for file in (tmp_path / folder).iterdir()}
    at, status = "org" if where == "hub" else f"{server.cdn}/w", 1 if name == "verify" else 0

    def words(models, out):
        out.mkdir()
        tuned = () if name == "verify" else (f"{models}/tuned",)
        return [name, *tuned, *(word.format(models, out) for word in WITH_SHARDS[name]), "--layer", ONE]

    here, _ = run(*words(tmp_path, tmp_path / "a"), status=status)
    there = downloaded(tmp_path, *words(at, tmp_path / "b"), status=status)
    if name == "extract":
        first, second = (tmp_path / out / "lora" / "adapter_model.safetensors" for out in "ab")
        assert first.read_bytes() == second.read_bytes()
    else:
        tables = [json.loads(text)["matrices"] for text in (here, there)]
        assert tables[0]
        assert len({json.dumps([row | {"checkpoint": ""} for row in table]) for table in tables}) == 1
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base").select(ONE)
    shards = sorted(part.path.rpartition("/")[2] for delta in source for ref in delta.refs for part in ref.parts)
    inside = "hub/*/snapshots/*" if where == "hub" else "ours/models/*"
    came = sorted(file.name for file in tmp_path.glob(f"{inside}/model-*"))
    assert len(shards) == 2 < 2 * SHARDS
    assert [name for name in came if name.endswith(".safetensors")] == shards


STORED = {
    "svd": ("svd", "{0}/tuned", "--top", "2"),
    "series": ("series", "{0}/tuned", "--step", "1"),
}


@pytest.mark.parametrize("name", STORED)
def test_what_is_recorded_of_a_download_is_that_of_its_folders_and_goes_on_offline(server, tmp_path, name):
    words = [word.format("org") for word in STORED[name]]
    words += ["--base", "org/base", "--layer", ONE, "--no-figures", "--out", str(tmp_path / "out")]
    downloaded(tmp_path, *words)
    folder = tmp_path / "out" / ("" if name == "svd" else "checkpoints/step-1")
    run_json = json.loads((folder / "run.json").read_text())
    commits = [server.models[f"org/{model}"].branches["main"] for model in ("tuned", "base")]
    homes = [f"{tmp_path}/hub/models--org--{model}/snapshots/{commit}" for model, commit in
             zip(("tuned", "base"), commits, strict=True)]  # fmt: skip
    assert [run_json["inputs"]["tuned"], run_json["inputs"]["base"]] == homes
    assert all(path.startswith(tuple(homes)) for path in run_json["inputs"]["files"])
    written = {file: file.stat().st_mtime_ns for file in folder.glob("spectra/*.safetensors")}
    start = len(server.seen)
    downloaded(tmp_path, *words)
    assert all(seen.sent < 5000 for seen in server.seen[start:])
    downloaded(tmp_path, *words, offline=True)
    assert written == {file: file.stat().st_mtime_ns for file in folder.glob("spectra/*.safetensors")} != {}


@pytest.mark.parametrize("name", STORED)
def test_results_of_the_same_commits_read_from_elsewhere_say_how_they_go_on(server, tmp_path, name):
    words = [word.format("org") for word in STORED[name]]
    words += ["--base", "org/base", "--layer", ONE, "--no-figures", "--out"]
    downloaded(tmp_path, *words, tmp_path / "down")
    run(*words, tmp_path / "ranges")
    _, err = run(*words, tmp_path / "down", status=1)
    assert "holds results of the same commits read from another place" in err
    assert f"run it as then (with --download and HF_HUB_CACHE={tmp_path}/hub), or choose another directory" in err
    told = downloaded(tmp_path, *words, tmp_path / "ranges", status=1, streams=True)
    assert f"({server.endpoint}/org/" in told
    assert "run it as then (without --download), or choose another directory" in told
    start = len(server.seen)
    _, err = run(*words, tmp_path / "ranges")
    assert "reused" in err
    assert sum(seen.sent for seen in server.seen[start:]) < 20_000
    server.add("org/tuned", tmp_path / "base")
    _, err = run(*words, tmp_path / "ranges", status=1)
    assert "holds results of other inputs (different: " in err


def test_a_source_whose_files_were_copied_is_the_one_that_is_opened_here(server, tmp_path, monkeypatch):
    """In its recipes too, by which stored results are known again: fused parts, stacks and codes among them."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2}
    base = {f"transformer.h.{i}.attn.c_attn.weight": torch.randn(64, 192) for i in range(2)}
    for name, tensors in {"gpt": base, "gpt-tuned": nudged(base)}.items():
        write_checkpoint(tmp_path / name, tensors, config=config)
        server.add(f"org/{name}", tmp_path / name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    afar, homes = spectra.open_source("org/gpt-tuned", "org/gpt"), {}
    assert at_home(afar, {}) == afar
    for name, address in (("gpt-tuned", afar.tuned), ("gpt", afar.base)):
        commit = server.models[f"org/{name}"].branches["main"]
        homes[address] = str(tmp_path / "cache" / f"models--org--{name}" / "snapshots" / commit)
        shutil.copytree(tmp_path / name, homes[address])
    here = spectra.open_source(*homes.values())
    assert at_home(afar, homes).deltas == here.deltas
    assert repr(at_home(afar, homes)) == repr(here)
    keys = [[fingerprint.of_delta(delta) for delta in source] for source in (at_home(afar, homes), here, afar)]
    assert keys[0] == keys[1] != keys[2]


def test_a_torch_file_is_downloaded_where_a_command_takes_shards(server, tmp_path):
    (tmp_path / "torch").mkdir()
    torch.save(nudged(larger(llama_tensors())), tmp_path / "torch" / "pytorch_model.bin")
    (tmp_path / "torch" / "config.json").write_text('{"model_type": "llama"}')
    server.add("org/torch", tmp_path / "torch")
    downloaded(tmp_path, "extract", "org/torch", "--base", "org/base", "--layer", "v_proj", "--rank", "1", "--dry-run")
    assert [file.name for file in tmp_path.glob("hub/*/snapshots/*/*.bin")] == ["pytorch_model.bin"]


def test_heads_of_an_adapter_that_needs_a_download_are_those_of_the_disk(server, tmp_path):
    prefix = "base_model.model.model.layers.0.self_attn.v_proj"
    heads = {f"{prefix}.lora_A.weight": torch.randn(2, 64)}
    heads |= {f"{prefix}.lora_B{i}.weight": torch.randn(32, 2) for i in range(3)}
    adapter = tmp_path / "multi"
    adapter.mkdir()
    torch.save(heads, adapter / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_nums": 3}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    server.add("org/multi", adapter)
    here, _ = run("heads", str(adapter), "--base", str(tmp_path / "base"), "--json")
    there = downloaded(tmp_path, "heads", "org/multi", "--base", "org/base", "--json")
    assert json.loads(there)["matrices"] == json.loads(here)["matrices"] != []
    _, err = run("heads", "org/multi", "--base", "org/base", status=1)
    assert "--download" in err
