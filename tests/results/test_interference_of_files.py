"""`interference` on files: matrices that only some updates have, what cannot be done, and the command."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reading
from support.command_line import lora_folder, run, strict, table

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.engine.executors.threads import thread_executor
from spectra.errors import SelectionError
from spectra.results.interference import interference_rows

SECOND = "model.layers.1.self_attn.v_proj.weight"


def negated(folder, path):
    """The adapter of a folder with the opposite sign."""
    lora_folder(path, seed=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {name: -tensor for name, tensor in tensors.items() if "lora_B" in name}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def first_layer_only(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "layers.0" in n}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc", start=1):
        lora_folder(tmp_path / name, seed=seed)
    return tmp_path


def test_a_matrix_that_some_have_is_measured_over_those_and_it_is_said(folders):
    first_layer_only(folders / "b")
    sources = [spectra.open_source(folders / name) for name in "abc"]
    rows = spectra.interference(sources).set_index("name")
    partial = rows.loc[SECOND]
    assert (partial["status"], partial["updates"], partial["note"]) == ("ok", [1, 3], "not in update 2")
    alone = spectra.interference([sources[0], sources[2]]).set_index("name").loc[SECOND]
    cosines = np.array(partial["cosines"])
    assert cosines[np.ix_([0, 2], [0, 2])].tolist() == alone["cosines"]
    assert np.isnan(cosines[1]).all()
    assert np.isnan(cosines[:, 1]).all()
    assert np.isnan(partial["sar"][1])
    assert [partial["sar"][0], partial["sar"][2]] == alone["sar"]
    only_one = spectra.interference([sources[1], sources[2].select("layers.0.*"), sources[0]]).set_index("name")
    assert only_one.loc[SECOND, "status"] == "alone"
    assert only_one.loc[SECOND, "reason"] == "only in update 3 of 3"


def test_what_cannot_be_done_has_its_status(folders):
    good = WeightDelta.from_tensor("w", torch.eye(3))
    bad = WeightDelta.from_tensor("w", torch.full((3, 3), torch.nan))
    other = WeightDelta.from_tensor("w", torch.eye(2))
    statuses = [spectra.interference([[good], [second]])["status"][0] for second in (good, bad, other)]
    assert statuses == ["ok", "nonfinite", "shape_mismatch"]


def test_one_update_or_strangers_are_refused():
    one = [WeightDelta.from_tensor("a", torch.eye(2))]
    with pytest.raises(SelectionError, match="give two or more"):
        spectra.interference([one])
    with pytest.raises(SelectionError, match="updates of one base"):
        spectra.interference([one, [WeightDelta.from_tensor("b", torch.eye(2))]])


def test_the_command_prints_means_and_keeps_strict_json(folders):
    negated(folders / "a", folders / "minus-a")
    out, err = run("interference", "a", "minus-a", "--out", "found")
    assert max(map(len, out.splitlines())) <= 80
    assert "by chance" in err
    document = strict(run("interference", "a", "minus-a", "--json")[0])
    assert strict((folders / "found/interference.json").read_text()) == document
    assert len(table(folders / "found/interference.csv")) == 2
    for found in document["matrices"]:
        assert found["cosines"] == [[1, -1], [-1, 1]], "exactly"
        assert found["norm_ratio"] == 0
        assert found["sar"] == [None, None]


def test_workers_and_an_executor_give_the_same_rows_in_order(folders):
    sources = [spectra.open_source(folders / name) for name in "abc"]
    alone = spectra.interference(sources)
    with thread_executor(2) as executor:
        assert spectra.interference(sources, executor=executor).equals(alone)
    one, several = (strict(run("interference", *"abc", *words, "--json")[0]) for words in ((), ("--workers", 2)))
    assert one["matrices"] == several["matrices"]


def test_what_is_left_waiting_when_the_rows_are_given_up_is_not_computed(folders, monkeypatch):
    deltas = [[WeightDelta.from_tensor(f"layers.{i}.w", torch.eye(3) * scale) for i in range(20)] for scale in (1, 2)]
    seen = []
    reading.watch(monkeypatch, lambda delta: seen.append(delta.name))
    with thread_executor(1) as executor:
        rows = interference_rows(deltas, executor=executor)
        assert next(rows)["name"] == "layers.0.w"
        rows.close()
    assert len(set(seen)) <= 3


def test_the_figures_stand_beside_their_numbers(folders):
    _, err = run("interference", *"abc", "--out", "found")
    for name in ("cosines.png", "cosines.csv", "interference_depth.png"):
        assert f"figure: found/{name}" in err
    rows = spectra.interference([spectra.open_source(folders / name) for name in "abc"])
    mean = np.mean(list(rows["cosines"]), axis=0)
    figure = spectra.cosines_figure(rows, list("abc"))
    assert figure.axes[0].images[0].get_array().filled() == pytest.approx(mean)
    assert figure.axes[0].images[0].get_clim() == (-1, 1)
    written = {(line["a"], line["b"]): float(line["cosine"]) for line in table(folders / "found/cosines.csv")}
    assert written == pytest.approx({("a", "b"): mean[0, 1], ("a", "c"): mean[0, 2], ("b", "c"): mean[1, 2]})
    (line,) = [
        line for line in spectra.plot_roles_over_depth(rows, column="sti").get_lines() if line.get_marker() == "o"
    ]
    assert line.get_ydata() == pytest.approx(rows["sti"])
    assert "cosines.png" not in run("interference", *"abc", "--out", "other", "--no-figures")[1]
    with pytest.raises(SelectionError, match="no matrix in a layer has a number in 'nothing'"):
        spectra.plot_roles_over_depth(rows, column="nothing")


def test_the_command_says_which_matrices_are_alone_and_wants_two(folders):
    first_layer_only(folders / "b")
    _, err = run("interference", "a", "b")
    assert f"1 matrices are in one update only, such as {SECOND}" in err
    _, err = run("interference", "a", status=2)
    assert "give two or more" in err
