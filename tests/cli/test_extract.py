"""`spectra extract` as a user types it."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder, run, strict

import spectra


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """`base/` and `tuned/`, a LLaMA in miniature and its fine-tune; and two LoRAs, `a/` and `b/`."""
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", nudged(base))
    lora_folder(tmp_path / "a", seed=1)
    lora_folder(tmp_path / "b", seed=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_fine_tune_becomes_a_lora_that_is_read_back(llama):
    out, err = run("extract", "--base", "base", "--tuned", "tuned", "--rank", 4, "--out", "lora", "--layer", "v_proj")
    assert "model.layers.1.self_attn.v_proj.weight" in out
    assert "adapter: lora" in err
    assert "not carried: a vector, not a matrix, which tuning changed" in err
    assert {delta.max_rank for delta in spectra.open_source("lora", "base")} == {4}


def test_json_is_one_document_with_rows_and_what_was_left(llama):
    rule = ("--parameters", 1500, "--out", "lora", "--json")
    document = strict(run("extract", "--base", "base", "--tuned", "tuned", *rule)[0])
    assert {"name", "rank", "relative_error", "parameters", "clamped"} <= set(document["matrices"][0])
    assert sum(row["parameters"] for row in document["matrices"]) == document["parameters"] <= 1500
    assert "model.norm.weight" in document["not_carried"]
    norms = {delta.name: float(delta.read().norm) for delta in spectra.open_source("tuned", "base")}
    lost = sum((row["relative_error"] * norms[row["name"]]) ** 2 for row in document["matrices"])
    assert document["relative_error"] == pytest.approx((lost / sum(n**2 for n in norms.values())) ** 0.5)


def test_a_dry_run_prints_the_table_and_writes_nothing(llama):
    out, err = run("extract", "--base", "base", "--tuned", "tuned", "--energy", 0.9, "--dry-run")
    assert out.splitlines()[0].split() == ["role", "matrices", "rank", "relative_error", "parameters"]
    assert "nothing was written" in err
    document = strict(run("extract", "--base", "base", "--tuned", "tuned", "--energy", 0.9, "--dry-run", "--json")[0])
    assert all(row["relative_error"] <= 0.1**0.5 for row in document["matrices"])
    assert {path.name for path in llama.iterdir()} == {"base", "tuned", "a", "b"}


@pytest.mark.parametrize("weights", [(0.5, -1.5), ("5e-1", "-1.5")])
def test_updates_are_added_up_with_weights_that_may_be_negative(weights, llama):
    run("extract", "--tuned", "a", "--tuned", "b", "--weights", *weights, "--rank", 8, "--out", "sum")
    parts = [{delta.name: delta.read().to_dense() for delta in spectra.open_source(name)} for name in "ab"]
    for delta in spectra.open_source("sum"):
        expected = 0.5 * parts[0][delta.name] - 1.5 * parts[1][delta.name]
        assert torch.allclose(delta.read().to_dense(), expected, atol=1e-5)


def test_a_stored_run_is_extracted(llama):
    run("svd", "--base", "base", "--tuned", "tuned", "--top", 4, "--out", "run", "--no-figures")
    out, _ = run("extract", "--tuned", "run", "--rank", 3, "--out", "lora", "--layer", "q_proj")
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["3", "3"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "none of --rank, --energy, --parameters and --above-noise given"),
        (("--rank", 2, "--above-noise"), "2 of --rank, --energy, --parameters and --above-noise given"),
        (("--energy", 1.5), "1.5 is not in the range"),
        (("--rank", 0), "0 is not in the range"),
        (("--rank", 2, "--weights", 1, 2), "2 --weights for 1 --tuned"),
        (("--rank", 2, "--format", "zip"), "'zip' is not one of"),
        (("--rank", 2, "--format", "kohya", "--save-modules"), "--save-modules"),
    ],
)
def test_usage_errors_exit_with_2(arguments, said, llama):
    _, err = run("extract", "--base", "base", "--tuned", "tuned", "--out", "lora", *arguments, status=2)
    assert said in err
    assert not (llama / "lora").exists()


def test_out_is_needed_unless_nothing_is_written(llama):
    _, err = run("extract", "--tuned", "a", "--rank", 1, status=2)
    assert "--out" in err


def test_errors_exit_with_1_and_one_message(llama):
    base = ("extract", "--base", "base", "--tuned", "tuned")
    _, err = run(*base, "--parameters", 10, "--out", "lora", status=1)
    assert err.strip().endswith("takes 24 a rank, the fewest")
    _, err = run(*base, "--rank", 2, "--out", "a", status=1)
    assert "is not empty, and nothing in it was touched" in err


def test_a_matrix_that_could_not_be_done_gives_status_1_and_the_rest(llama):
    tensors = nudged(llama_tensors())
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    write_checkpoint(llama / "tuned", tensors)
    _, err = run("extract", "--base", "base", "--tuned", "tuned", "--rank", 2, "--out", "lora", status=1)
    assert "1 of 16 matrices could not be done" in err
    assert len(spectra.open_source("lora", "base")) == 15
