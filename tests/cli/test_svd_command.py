"""`spectra svd` as a user meets it: the table, the json, what --out holds, and what could not be done."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder, run, strict

import spectra
from spectra.results import shelf


def test_the_missions_first_command(llama):
    out, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt/", "--layer", "v_proj")
    lines = out.splitlines()
    assert len(lines) == 3
    assert "model.layers.1.self_attn.v_proj.weight" in lines[2]
    assert "8×16" in lines[1]
    assert "effective_rank" in lines[0]
    assert "skipped" in err


def test_values_agree_with_float64_numpy_on_the_real_pair(real_pair, tmp_path):
    base, tuned = real_pair
    run("svd", "--base", base, "--tuned", tuned, "--top", 30, "--out", tmp_path / "run", "--no-figures")
    stored = spectra.load(tmp_path / "run")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    assert len(stored) == 40
    checked = 0
    for found in stored:
        if found.role == "embed_tokens":
            continue  # 30522×384: its oracle takes longer than all others together
        delta = after[found.name].double().numpy() - before[found.name].double().numpy()
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        if not S.any():
            assert found.status == "unchanged"
            continue
        assert np.abs(found.S - S).max() <= 1e-7 * S[0]
        k = found.k
        assert np.abs((found.U * found.S[:k]) @ found.Vh - (U[:, :k] * S[:k]) @ Vh[:k]).max() <= 1e-6 * S[0]
        checked += 1
    assert checked == 38
    assert stored["pooler.dense.weight"].status == "unchanged"


@pytest.mark.parametrize("top", [(), ("--top", 3)])
def test_figures_of_a_run_need_no_second_reading_and_are_those_of_what_is_stored(llama, monkeypatch, top):
    read = []
    piece = shelf.read_piece
    monkeypatch.setattr(shelf, "read_piece", lambda path, *a, **k: (read.append(path.name), piece(path, *a, **k))[1])
    command = ("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "run", *top)
    run(*command)
    assert read == []
    names = ("histogram.csv", "depth.csv", "histogram.png", "depth.png")
    drawn = {name: (llama / "run" / name).read_bytes() for name in names}
    run("plot", "run")
    assert len(read) == 16
    assert {name: (llama / "run" / name).read_bytes() for name in names} == drawn
    run(*command)
    assert len(read) == 32, "for the table and the figures, each once"
    assert {name: (llama / "run" / name).read_bytes() for name in names} == drawn


def test_out_holds_what_the_contract_says(llama):
    out, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "run", "--top", 3)
    assert "figure: run/histogram.png" in err
    for name in ("summary.csv", "run.json", "histogram.png", "histogram.pdf"):
        assert (llama / "run" / name).stat().st_size > 0
    rows = list(csv.DictReader((llama / "run" / "summary.csv").open()))
    assert len(rows) == 16
    assert all(row["status"] == "ok" and float(row["stable_rank"]) >= 1 for row in rows)
    assert "role" in out.splitlines()[0]
    again, _ = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "run", "--top", 3)
    assert again == out


def test_json_is_one_strict_document_and_nothing_else(llama):
    out, _ = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "q_proj", "--json")
    document = strict(out)
    assert document["kind"] == "checkpoint"
    assert len(document["matrices"]) == 2
    matrix = document["matrices"][0]
    assert len(matrix["singular_values"]) == 16
    assert matrix["norm"] == pytest.approx(np.linalg.norm(matrix["singular_values"]))
    assert document["coverage"]["skipped"]


def test_json_has_null_where_there_is_no_number(llama):
    tensors = load_file(llama / "models/llama-7b/model-00001-of-00002.safetensors")
    tensors |= load_file(llama / "models/llama-7b/model-00002-of-00002.safetensors")
    write_checkpoint(llama / "same", tensors)
    out, _ = run("svd", "--base", "llama-7b", "--tuned", "same", "--layer", "q_proj", "--json")
    (matrix, _) = strict(out)["matrices"]
    assert matrix["status"] == "unchanged"
    assert matrix["stable_rank"] is None
    assert matrix["norm"] == 0


def test_another_layer_joins_a_run_on_shards(llama):
    for layer in ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"):
        run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", layer, "--out", "run", "--no-figures")
    assert len(spectra.load("run")) == 2


def test_broken_matrices_are_listed_and_the_others_done(llama):
    tensors = nudged(llama_tensors())
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("nan")
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(4, 16)
    write_checkpoint(llama / "bad", tensors)
    out, err = run("svd", "--base", "llama-7b", "--tuned", "bad", "--layer", "self_attn", "--json", status=1)
    status = {matrix["name"]: matrix["status"] for matrix in strict(out)["matrices"]}
    assert list(status.values()).count("ok") == 6
    assert status["model.layers.0.self_attn.v_proj.weight"] == "nonfinite"
    assert status["model.layers.1.self_attn.v_proj.weight"] == "shape_mismatch"
    assert "1 entries are NaN or infinite" in err
    assert "2 of 8 matrices could not be done" in err


def test_a_missing_shard_costs_only_its_own_matrices(llama):
    (llama / "ckpt" / "model-00002-of-00003.safetensors").unlink()
    out, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--json", status=1)
    status = [matrix["status"] for matrix in strict(out)["matrices"]]
    assert set(status) == {"ok", "unreadable"}
    assert "model-00002-of-00003.safetensors is missing; download it again" in err


def test_k_larger_than_the_rank_is_clamped_and_said(llama):
    lora_folder(llama / "a", seed=1, rank=4)
    _, err = run("svd", "--tuned", "a", "--top", 30)
    assert "top 30 is more than the rank allows: 4 kept (2 matrices)" in err


def test_progress_is_quiet_in_a_pipe(llama):
    result = subprocess.run(
        [sys.executable, "-m", "spectra", "svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "v_proj"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "%|" not in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_a_single_file_is_a_source(llama):
    save_file(llama_tensors(), llama / "base.safetensors")
    torch.save({"state_dict": nudged(llama_tensors())}, llama / "tuned.pt")
    out, _ = run("svd", "--base", "base.safetensors", "--tuned", "tuned.pt", "--layer", "v_proj")
    assert len(out.splitlines()) == 3
