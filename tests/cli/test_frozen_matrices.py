"""Matrices that an update leaves exactly as they are: said, in the document, and no failure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import lora_folder, run, strict

import spectra
from spectra.deltas.delta import WeightDelta

FIRST, SECOND = (f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(2))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three adapters; b's first layer was never trained, so that its B is zero."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        lora_folder(tmp_path / name, seed=seed)
    tensors = load_file(tmp_path / "b/adapter_model.safetensors")
    tensors |= {name: tensor * 0 for name, tensor in tensors.items() if "layers.0" in name and "lora_B" in name}
    save_file(tensors, tmp_path / "b/adapter_model.safetensors")
    return tmp_path


def test_two_updates_one_of_which_leaves_a_matrix_as_it_is(folders):
    out, err = run("similarity", "a", "b", "--top", "3")
    assert SECOND in out
    assert FIRST not in out
    assert f"not compared: unchanged in the second update: ΔW = 0 has no directions: {FIRST}" in err
    assert "could not be compared" not in err
    document = strict(run("similarity", "b", "a", "--top", "3", "--json")[0])
    assert [row["name"] for row in document["matrices"]] == [SECOND]
    (line,) = document["not_compared"]
    assert (line["name"], line["status"]) == (FIRST, "unchanged")
    assert "the first update" in line["reason"]


def test_three_updates_one_of_which_leaves_a_matrix_as_it_is(folders):
    _, err = run("similarity", *"abc", "--top", "3", "--out", "found")
    assert err.count("unchanged") == 1
    assert f"unchanged in b, and in none of its pairs: {FIRST}" in err
    document = strict(run("similarity", *"abc", "--top", "3", "--json")[0])
    assert [(row["a"], row["b"]) for row in document["pairs"] if row["name"] == FIRST] == [("a", "c")]
    assert {(line["a"], line["b"], line["status"]) for line in document["not_compared"]} == {
        ("a", "b", "unchanged"),
        ("b", "c", "unchanged"),
    }
    opened = {name: spectra.open_source(name) for name in "abc"}
    pairs = spectra.Pairs(spectra.compare_all(opened, top=3))
    assert (pairs.unchanged, pairs.failed) == ({"b": [FIRST]}, [])
    assert np.isnan(pairs.square("left", "layer", 0)[0, 1])


def test_stored_runs_say_the_same(folders):
    for name in "ab":
        run("svd", "--tuned", name, "--top", "4", "--no-figures", "--out", f"runs-{name}")
    _, err = run("similarity", "runs-a", "runs-b", "--top", "3")
    assert "unchanged in the second update" in err


def test_nothing_but_frozen_matrices_is_no_success(folders):
    _, err = run("similarity", "a", "b", "--layer", "layers.0.*", status=1)
    assert "nothing is left to compare" in err


def test_what_failed_beside_a_frozen_matrix_is_still_a_failure():
    frozen = [WeightDelta.from_tensor("w", torch.zeros(3, 3))]
    broken = [WeightDelta.from_tensor("w", torch.full((3, 3), torch.nan))]
    for first, second, status in (
        (frozen, frozen, "unchanged"),
        (frozen, broken, "failed"),
        (broken, frozen, "failed"),
    ):
        (item,) = spectra.compare(first, second)
        assert item.status == status, item.reason
    assert item.reason.startswith("nonfinite")
    both = next(iter(spectra.compare(frozen, frozen)))
    assert (both.unchanged, both.reason) == (
        ("first", "second"),
        "unchanged in both updates: ΔW = 0 has no directions",
    )
