"""`spectra verify`: what it prints, where, and its exit status."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from click.testing import CliRunner
from support.merges import Merge, peft_merge

from spectra.cli import main

Q = "model.layers.0.self_attn.q_proj.weight"
KEYS = ["name", "role", "layer", "verdict", "scale", "residual", "rounding", "replay", "cause", "note"]


def run(merge: Merge, *options: str):
    base, adapter, merged = map(str, merge.paths)
    arguments = ["verify", "--base", base, "--adapter", adapter, "--merged", merged, *options]
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def merge(tmp_path) -> Merge:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return peft_merge(tmp_path, config, stored=torch.bfloat16)


def forget(merge: Merge) -> None:
    before = merge.weights("base")
    merge.rewrite("merged", lambda tensors: tensors.update({Q: before[Q]}))


def test_a_right_merge_prints_a_short_table_and_exits_with_0(merge):
    result = run(merge)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["role", "verdict", "matrices", "scale", "residual", "rounding"]
    assert [line.split()[:3] for line in lines[1:]] == [[f"{kind}_proj", "exact", "2"] for kind in ("q", "v", "down")]
    assert max(map(len, lines)) <= 80
    assert "6 of 6 matrices are as merged; 10 that the adapter does not touch equal the base" in result.stderr
    assert "bit for bit (6 matrices): ΔW in float32, sum in float32, cast (PEFT, mergekit)" in result.stderr


def test_what_is_wrong_comes_first_and_exits_with_1(merge):
    forget(merge)
    result = run(merge)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"{Q}: not applied (s = 0)", "    M = W₀"]
    assert max(map(len, lines)) <= 80
    assert "5 of 6 matrices are as merged" in result.stderr


def test_json_is_one_strict_document(merge):
    forget(merge)
    merge.rewrite("merged", lambda tensors: tensors["lm_head.weight"].mul_(float("nan")))
    result = run(merge, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout, parse_constant=pytest.fail)
    assert document["verdict"] == "not applied"
    assert document["counts"] == {"not applied": 1, "untouched but changed": 1, "exact": 5}
    assert document["untouched"] == 9
    assert [list(row) for row in document["matrices"]] == [KEYS] * 7
    rows = {row["name"]: row for row in document["matrices"]}
    assert rows[Q]["verdict"] == "not applied"
    assert rows[Q]["scale"] == 0
    assert rows["lm_head.weight"]["scale"] is None


def test_layers_and_a_pattern_that_matches_nothing(merge):
    forget(merge)
    assert run(merge, "--layer", "v_proj", "--json").exit_code == 0
    assert run(merge, "--layer", "q_proj").exit_code == 1
    result = run(merge, "--layer", "nothing")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: layer pattern 'nothing' matches none of")
    silent = run(merge, "--layer", "k_proj")
    assert silent.exit_code == 1
    assert "changes none of the 2 matrices that were asked for; they equal the base" in silent.stderr


@pytest.mark.parametrize("which", ["base", "adapter", "merged"])
def test_a_path_that_leads_nowhere_is_one_line(merge, tmp_path, which):
    result = run(Merge(**{**vars(merge), which: tmp_path / "nowhere"}))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output


def test_an_option_that_is_missing_is_a_matter_of_usage(merge):
    assert CliRunner().invoke(main, ["verify", "--base", str(merge.base)]).exit_code == 2


def test_many_wrong_matrices_are_counted(merge):
    merge.rewrite("merged", lambda tensors: tensors.update({name: 2 * t for name, t in tensors.items() if t.ndim == 2}))
    result = run(merge)
    assert result.exit_code == 1
    assert "… and 4 more; --json lists all" in result.stdout
