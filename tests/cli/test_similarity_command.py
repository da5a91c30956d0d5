"""`spectra similarity` as a user meets it: weights and stored runs, json, resuming, the figure of what was asked."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from support import reading
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint
from support.command_line import lora_folder, run, strict, table, titles

import spectra
from spectra.errors import SelectionError


def test_the_missions_second_command(llama):
    lora_folder(llama / "a", seed=1)
    lora_folder(llama / "b", seed=2)
    out, _ = run("similarity", "a/", "b/", "--top", "30")
    assert "left" in out
    assert "k clamped from 30 to 4" in out


def test_similarity_stores_draws_and_prints_json(llama):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    arguments = ["similarity", "ckpt", "other", "--base", "llama-7b", "--layer", "v_proj", "--top", 5, "--side", "both"]
    _, err = run(*arguments, "--out", "sim")
    assert "figure: sim/similarity.png" in err
    rows = list(csv.DictReader((llama / "sim" / "similarity.csv").open()))
    assert {(row["side"], row["k_used"]) for row in rows} == {("left", "5"), ("right", "5")}
    assert 0 <= float(rows[0]["phi"]) <= 1
    document = strict(run(*arguments, "--json")[0])
    assert len(document["matrices"]) == 4
    assert np.shape(document["matrices"][0]["grid"]) == (5, 5)


def test_similarity_resumes_and_is_never_replaced_by_less(llama, monkeypatch):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    arguments = ["similarity", "ckpt", "other", "--base", "llama-7b", "--out", "sim", "--no-figures"]
    first, _ = run(*arguments, "--layer", "v_proj", "--top", 5)
    with monkeypatch.context() as patch:
        reading.refuse(patch)
        assert run(*arguments, "--layer", "v_proj", "--top", 5)[0] == first
    _, err = run(*arguments, "--layer", "v_proj", "--top", 2, status=1)
    assert "different: top" in err
    run(*arguments, "--layer", "q_proj", "--top", 5)
    assert len(list(csv.DictReader((llama / "sim" / "similarity.csv").open()))) == 4


def test_similarity_of_stored_runs_equals_that_of_their_sources(llama):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    for tuned in ("ckpt", "other"):
        run("svd", "--base", "llama-7b", "--tuned", tuned, "--top", 5, "--out", f"run-{tuned}", "--no-figures")
    stored = strict(run("similarity", "run-ckpt", "run-other", "--top", 5, "--json")[0])
    fresh = strict(run("similarity", "ckpt", "other", "--base", "llama-7b", "--top", 5, "--json")[0])
    by_name = {matrix["name"]: matrix for matrix in fresh["matrices"]}
    assert len(stored["matrices"]) == len(by_name) == 16
    for matrix in stored["matrices"]:
        assert np.allclose(matrix["grid"], by_name[matrix["name"]]["grid"], atol=1e-9)
    mixed = strict(run("similarity", "run-ckpt", "other", "--base", "llama-7b", "--top", 5, "--json")[0])
    assert [matrix["phi"] for matrix in mixed["matrices"]] == [matrix["phi"] for matrix in fresh["matrices"]]


def test_runs_without_vectors_are_computed_from_what_they_were_made_of(llama):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    for tuned in ("ckpt", "other"):
        run("svd", "--base", "llama-7b", "--tuned", tuned, "--layer", "v_proj", "--out", f"run-{tuned}", "--no-figures")
    out, err = run("similarity", "run-ckpt", "run-other", "--top", 2)
    assert len(out.splitlines()) == 3
    assert [line.split(":")[0] for line in err.splitlines()] == [f"run-{name} holds no vectors" for name in
                                                                 ("ckpt", "other")]  # fmt: skip
    fresh, _ = run("similarity", "ckpt", "other", "--base", "llama-7b", "--layer", "v_proj", "--top", 2)
    assert out == fresh
    three, _ = run("similarity", "run-ckpt", "run-other", "ckpt", "--base", "llama-7b", "--layer", "v_proj", "--top", 2)
    assert "1.000" in three


def test_runs_whose_inputs_changed_are_one_line_with_the_command(llama):
    run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "v_proj", "--out", "run", "--no-figures")
    write_checkpoint(llama / "ckpt", nudged(llama_tensors(), seed=9), shards=3)
    _, err = run("similarity", "run", "run", status=1)
    assert len(err.splitlines()) == 1
    assert "is not what it was made of any more" in err
    assert f"spectra svd --tuned {llama}/ckpt --base" in err
    assert "--top 31 --out DIR" in err


def test_stored_values_alone_are_one_sentence_in_python(llama):
    run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "v_proj", "--out", "run", "--no-figures")
    values = spectra.load("run")
    with pytest.raises(SelectionError, match=r"run holds no singular vectors to compare: .*--top 30"):
        list(spectra.compare(values, values))


def test_python_takes_stored_runs_by_their_paths_as_the_command_does(llama):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    for name in ("ckpt", "other"):
        run("svd", "--base", "llama-7b", "--tuned", name, "--layer", "v_proj", "--out", f"run-{name}", "--no-figures")
    sources = [spectra.open_source(name, "llama-7b").select("v_proj") for name in ("ckpt", "other")]
    wanted = {item.name: item.phi for item in spectra.compare(*sources, top=2)}
    assert len(wanted) == 2
    for first, second in (("run-ckpt", "run-other"), ("run-ckpt", sources[1]), (sources[0], llama / "run-other")):
        assert {item.name: item.phi for item in spectra.compare(first, second, top=2)} == wanted


def test_query_against_key_within_one_model(llama, drawn):
    words = ["--base", "llama-7b", "--layer", "q_proj", "--against", "k_proj", "--top", 4]
    _, err = run("similarity", "ckpt", *words, "--out", "qk")
    assert "figure: qk/similarity.png" in err
    assert titles(drawn[0]) == ["q_proj against k_proj, right"]
    assert drawn[0].axes[0].get_ylabel().replace("\n", " ") == "i: top directions of q_proj"
    source = spectra.open_source("ckpt", "llama-7b")
    found = spectra.decompose(source, top=5).collect()
    rows = strict(run("similarity", "ckpt", "ckpt", *words, "--json")[0])["matrices"]
    for row in rows:
        query, key = found[row["name"]], found[row["name"].replace("q_proj", "k_proj")]
        assert row["other"] == key.name
        assert row["phi"] == pytest.approx(spectra.subspace_similarity(query, key, top=4, side="right").phi)
    assert len(rows) == len(source.select("q_proj"))
    run(
        "similarity",
        "ckpt",
        "--base",
        "llama-7b",
        "--layer",
        "q_proj",
        "--against",
        "v_proj",
        "--top",
        4,
        "--out",
        "qk",
    )
    assert titles(drawn[1]) == ["q_proj against v_proj, right"], "both are kept, and what was asked for is drawn"
    assert len(table(llama / "qk/similarity.csv")) == 4


def test_each_head_against_a_plain_lora(llama):
    generator = torch.Generator().manual_seed(3)
    prefix = "base_model.model.model.layers.0.self_attn.v_proj"
    heads = {f"{prefix}.lora_B{i}.weight": torch.randn(8, 4, generator=generator) for i in range(3)}
    down = torch.randn(4, 16, generator=generator)
    write_adapter(llama / "heads", {f"{prefix}.lora_A.weight": down, **heads},
                  {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_nums": 3})  # fmt: skip
    up = heads[f"{prefix}.lora_B1.weight"]
    write_adapter(llama / "plain", {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up},
                  {"peft_type": "LORA", "r": 4, "lora_alpha": 8})  # fmt: skip
    for pair in (("heads", "plain"), ("plain", "heads")):
        rows = strict(run("similarity", *pair, "--heads", "each", "--top", 4, "--out", "-".join(pair), "--json")[0])
        phi = [row["phi"] for row in rows["matrices"]]
        assert phi[1] == pytest.approx(1)
        assert max(phi[0], phi[2]) < 0.99
        assert len(table(llama / "-".join(pair) / "similarity.csv")) == 3


def test_similarity_and_svd_keep_the_numbers_of_their_figures(llama, compared):
    _, err = run("similarity", "a", "full", "--base", "llama-7b", "--top", 3, "--layer", "v_proj", "--out", "sim")
    assert "sim/similarity_grid.csv" in err
    assert [(row["i"], row["j"]) for row in table(llama / "sim/similarity_grid.csv")][:4] == [
        *(("1", "1"), ("1", "2"), ("1", "3"), ("2", "1"))
    ]
    _, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "v_proj", "--out", "run")
    assert "run/histogram.csv" in err
    rows = table(llama / "run/histogram.csv")
    assert list(rows[0]) == ["panel", "curve", "left", "right", "height", "count"]
    assert sum(int(row["count"]) for row in rows if row["panel"] == "all values") == 16
    assert {row["curve"] for row in rows} == {"v_proj"}


def test_updates_of_one_folder_name_are_told_apart_by_the_folder_above(llama, drawn):
    for run_name, seed in (("lora", 1), ("full", 2)):
        write_checkpoint(llama / run_name / "step-9", nudged(llama_tensors(), seed=seed))
    run("similarity", "lora/step-9", "full/step-9", "--base", "llama-7b", "--layer", "v_proj", "--out", "sim")
    assert drawn[0].axes[0].get_ylabel().replace("\n", " ") == "i: top directions of lora"
    assert drawn[0].axes[0].get_xlabel().replace("\n", " ") == "j: top directions of full"


def test_the_figure_shows_what_was_asked_for_not_all_that_is_stored(llama, drawn):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    command = ["similarity", "ckpt", "other", "--base", "llama-7b", "--top", 3, "--out", "sim"]
    run(*command, "--layer", "v_proj", "--side", "both")
    run(*command, "--layer", "q_proj", "--side", "right")
    assert [titles(figure) for figure in drawn] == [["v_proj, left", "v_proj, right"], ["q_proj, right"]]
    assert {row["panel"] for row in table(llama / "sim/similarity_grid.csv")} == {"q_proj, right"}
    assert len(table(llama / "sim/similarity.csv")) == 6, "the table is of everything"
