"""`spectra series` as a user meets it."""

from __future__ import annotations

import pytest
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import run, strict, table

COLUMNS = {
    "step", "name", "norm", "stable_rank", "top_1_share", "effective_rank", "phi_to_last", "phi_to_previous",
}  # fmt: skip


@pytest.fixture
def checkpoints(llama):
    for step in (20, 100):
        write_checkpoint(llama / f"checkpoint-{step}", nudged(llama_tensors(), seed=step, size=step * 1e-4))
    return llama


def test_the_table_is_by_step_and_role_with_chance_levels(checkpoints):
    out, err = run(
        "series", "--base", "llama-7b", "checkpoint-100", "checkpoint-20", "--layer", "self_attn", "--top", 3
    )
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["20", "q_proj"], ["20", "k_proj"]]
    assert lines[-1].split()[0] == "100"
    assert max(map(len, lines)) <= 100
    assert "by chance: φ last 0.19 – 0.38" in err


def test_json_has_the_contracts_rows_and_out_keeps_table_arrays_and_figure(checkpoints):
    arguments = ["series", "--base", "llama-7b", "checkpoint-20", "checkpoint-100", "--layer", "q_proj"]
    out, _ = run(*arguments, "--out", "kept", "--json")
    document = strict(out)
    assert [item["step"] for item in document["checkpoints"]] == [20, 100]
    assert len(document["matrices"]) == 4
    assert all(set(row) >= COLUMNS for row in document["matrices"])
    assert [row["name"] for row in table(checkpoints / "kept/series.csv")] == [r["name"] for r in document["matrices"]]
    for name in ("series.png", "series.pdf", "series_curves.csv", "run.json"):
        assert (checkpoints / "kept" / name).is_file(), name
    (checkpoints / "kept/series.png").unlink()
    run("plot", "kept")
    assert (checkpoints / "kept/series.png").is_file()
    again, _ = run("series", "--out", "kept", "--json")
    assert [row["phi_to_last"] for row in strict(again)["matrices"]] == [r["phi_to_last"] for r in document["matrices"]]
    run(
        "series",
        "--base",
        "llama-7b",
        "checkpoint-20",
        "checkpoint-100",
        "--layer",
        "q_proj",
        "--out",
        "bare",
        "--no-figures",
    )
    assert not (checkpoints / "bare/series.png").exists()


def test_what_cannot_be_read_is_one_message_and_status_1(checkpoints):
    (checkpoints / "checkpoint-20/model.safetensors").write_bytes(b"short")
    out, err = run("series", "--base", "llama-7b", "checkpoint-20", "checkpoint-100", "--layer", "q_proj", status=1)
    assert [line for line in err.splitlines() if "checkpoint-20" in line] == [
        line for line in err.splitlines() if line.startswith("not done: checkpoint-20: ")
    ]
    assert err.count("not done") == 1
    assert out.splitlines()[1].startswith("100")


def test_checkpoints_that_lack_matrices_are_named(checkpoints):
    tensors = nudged(llama_tensors(), seed=5)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    write_checkpoint(checkpoints / "checkpoint-50", tensors)
    _, err = run("series", "--base", "llama-7b", "checkpoint-50", "checkpoint-100", "--layer", "q_proj")
    assert "not in checkpoint-50: 1 matrices of others, such as model.layers.1.self_attn.q_proj.weight" in err


def test_wrong_usage_says_what_to_give(checkpoints):
    _, err = run("series", status=2)
    assert "give the checkpoints of one run" in err
    for nowhere in ("./nothere", "nothere", "checkpoint-20/nothere"):
        _, err = run("series", "--base", "llama-7b", nowhere, status=1)
        assert f"'{nowhere}' was not found" in err
        assert "step" not in err.replace("checkpoint", "")
    _, err = run("series", "--base", "llama-7b", "ckpt", status=1)
    assert "--step N" in err
    out, _ = run("series", "--base", "llama-7b", "ckpt", "--step", 7, "--layer", "q_proj")
    assert out.splitlines()[1].startswith("7 ")
