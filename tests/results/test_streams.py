"""`decompose` and `compare` from Python: streams, collections in the source's order, and directories that resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import reading
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder, run
from support.spectra_kinds import SlowMatrix, same_spectrum, slow_deltas

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.deltas.source import Source
from spectra.engine.executors.threads import thread_executor
from spectra.errors import SelectionError, StoreError

NAME = "model.layers.0.self_attn.v_proj.weight"


def reads(monkeypatch):
    """Names of the deltas that are read from now on."""
    names = []
    reading.watch(monkeypatch, lambda delta: names.append(delta.name))
    return names


def stored_bytes(directory):
    return {path.name: path.read_bytes() for path in (directory / "spectra").iterdir()}


@pytest.fixture
def other(tmp_path, source):
    """Another fine-tune of the same base."""
    write_checkpoint(tmp_path / "other", nudged(llama_tensors(), seed=9))
    return spectra.open_source(tmp_path / "other", tmp_path / "base")


def test_a_stream_comes_as_it_finishes_and_a_collection_in_the_sources_order():
    deltas = [WeightDelta(f"w.{i}", (8, 8), SlowMatrix(i, 8, 0.3 if i == 0 else 0.0), 8) for i in range(4)]
    with thread_executor(2) as executor:
        found = spectra.decompose(deltas, executor=executor)
        assert found.names == tuple(delta.name for delta in deltas)
        assert len(found) == 4
        assert next(found).name != "w.0"
        collected = spectra.decompose(deltas, executor=executor).collect()
    assert collected.names == found.names
    assert isinstance(collected, spectra.Spectra)
    assert collected.directory is None


def test_the_stream_is_lazy(monkeypatch):
    names = reads(monkeypatch)
    found = spectra.decompose(slow_deltas(3, delay=0.0), device="cpu")
    assert names == []
    next(found)
    assert len(names) < 3 or torch.get_num_threads() > 1


def test_what_was_taken_from_a_stream_is_not_silently_missing():
    found = spectra.decompose(slow_deltas(2, delay=0.0), device="cpu")
    next(found)
    with pytest.raises(SelectionError, match="taken from this stream already"):
        found.collect()


def test_collecting_two_of_a_name_is_an_error():
    twice = [WeightDelta.from_tensor("w", torch.eye(2)) for _ in range(2)]
    with pytest.raises(SelectionError, match="w is there twice"):
        spectra.decompose(twice).collect()


def test_out_computes_nothing_twice_and_gives_the_stored_collection(tmp_path, source, monkeypatch):
    first = spectra.decompose(source, top=3, out=tmp_path / "run").collect()
    assert first.directory == tmp_path / "run"
    assert first.names == source.names, "not the directory's order"
    names = reads(monkeypatch)
    again = spectra.decompose(source, top=3, out=tmp_path / "run").collect()
    assert names == []
    for one, other in zip(first, again, strict=True):
        same_spectrum(one, other)
    selected = source.select("v_proj")
    assert spectra.decompose(selected, top=3, out=tmp_path / "run").collect().names == selected.names


@pytest.mark.parametrize("options", [{}, {"split": False, "scale": 2}])
def test_python_and_the_command_make_the_same_directory_and_go_on_with_each_others(tmp_path, monkeypatch, options):
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", nudged(base))
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base", **options)
    spectra.decompose(source, top=3, out=tmp_path / "python").collect()
    words = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--top", 3, "--no-figures"]
    words += ["--no-split", "--scale", 2] if options else []
    printed, _ = run("svd", *words, "--out", tmp_path / "command")
    assert stored_bytes(tmp_path / "python") == stored_bytes(tmp_path / "command")
    assert (tmp_path / "python/summary.csv").read_bytes() == (tmp_path / "command/summary.csv").read_bytes()
    inputs = [json.loads((tmp_path / way / "run.json").read_text())["inputs"] for way in ("python", "command")]
    assert inputs[0] == inputs[1]
    names = reads(monkeypatch)
    spectra.decompose(source, top=3, out=tmp_path / "command").collect()
    assert run("svd", *words, "--out", tmp_path / "python")[0] == printed
    assert names == []


def test_other_options_of_the_source_are_other_inputs(tmp_path, source):
    spectra.decompose(source, out=tmp_path / "run").collect()
    whole = spectra.open_source(tmp_path / "tuned", tmp_path / "base", split=False)
    with pytest.raises(StoreError, match=r"different: options.*another directory \(out=, --out\)"):
        spectra.decompose(whole, out=tmp_path / "run").collect()


def test_only_the_top_is_stored_and_never_replaces_more(tmp_path, source, monkeypatch):
    values = source.select("v_proj")
    (first, second) = values.names
    spectra.decompose(source.select(first), out=tmp_path / "run").collect()
    found = spectra.decompose(values, top=2, only_top=True, out=tmp_path / "run").collect()
    assert [(len(spectrum.S), spectrum.k) for spectrum in found] == [(8, 2), (2, 2)], "all values stay"
    names = reads(monkeypatch)
    spectra.decompose(values, top=2, only_top=True, out=tmp_path / "run").collect()
    assert names == []
    everything = spectra.decompose(values, top=1, out=tmp_path / "run").collect()
    assert names == [second]
    assert [(len(spectrum.S), spectrum.k) for spectrum in everything] == [(8, 2), (8, 2)]


def test_what_cannot_be_recognised_again_is_not_kept(tmp_path):
    deltas = [WeightDelta.from_tensor("w", torch.eye(2))]
    with pytest.raises(SelectionError, match="out= keeps the results of a source"):
        spectra.decompose(deltas, out=tmp_path / "run")
    with pytest.raises(SelectionError, match="w is a matrix in memory"):
        spectra.decompose(Source("mine", tuple(deltas)), out=tmp_path / "run").collect()
    assert not (tmp_path / "run").exists()


def similar(a, b, **options):
    """(name, side) → similarity."""
    return {(item.name, item.side): item for item in spectra.compare(a, b, **options)}


def test_sources_and_their_spectra_compare_alike(tmp_path, source, other):
    spectra.decompose(source, top=5, out=tmp_path / "a").collect()
    kept = [spectra.load(tmp_path / "a"), spectra.decompose(other, top=5).collect()]
    weights = similar(source, other, top=4, sides=("left", "right"))
    vectors = similar(*kept, top=4, sides=("left", "right"))
    assert set(weights) == set(vectors)
    assert len(weights) == 2 * len(source)
    for key, similarity in weights.items():
        assert similarity.grid == pytest.approx(vectors[key].grid, abs=1e-7)  # those of the first are float32


def test_two_of_a_kind_are_compared(source):
    found = spectra.decompose(source.select("v_proj"), top=2).collect()
    with pytest.raises(SelectionError, match="two of a kind"):
        spectra.compare(found, source)


def test_matrices_of_one_update_only_are_told(source, other):
    found = list(spectra.compare(source.select(["v_proj", "q_proj"]), other.select("v_proj"), top=2))
    alone = [item for item in found if isinstance(item, spectra.NotCompared)]
    assert {item.name for item in alone} == set(source.select("q_proj").names)
    assert all(item.one_sided and item.reason == "only in the first update" for item in alone)
    assert len(found) == 4


def test_comparing_goes_on_where_the_command_stopped(tmp_path, source, other, monkeypatch):
    first = similar(source, other, top=4, out=tmp_path / "sim")
    reading.refuse(monkeypatch)
    again = similar(source, other, top=4, out=tmp_path / "sim")
    assert {key: item.phi for key, item in again.items()} == {key: item.phi for key, item in first.items()}
    run("similarity", tmp_path / "tuned", tmp_path / "other", "--base", tmp_path / "base", "--top", 4, "--no-figures",
        "--out", tmp_path / "sim")  # fmt: skip
    inputs = json.loads((tmp_path / "sim/run.json").read_text())["inputs"]
    assert (inputs["a"], inputs["b"]) == (str(tmp_path / "tuned"), str(tmp_path / "other"))
    with pytest.raises(StoreError, match="different: top"):
        similar(source, other, top=3, out=tmp_path / "sim")


def test_a_comparison_of_spectra_is_kept_too(tmp_path, source, other):
    for name, updates in (("a", source), ("b", other)):
        spectra.decompose(updates.select("v_proj"), top=3, out=tmp_path / name).collect()
    runs = [spectra.load(tmp_path / name) for name in "ab"]
    found = similar(*runs, top=3, out=tmp_path / "sim", labels=("mine", "yours"))
    rows = (tmp_path / "sim/similarity.csv").read_text().splitlines()
    assert len(rows) == 1 + len(found) == 3
    assert json.loads((tmp_path / "sim/run.json").read_text())["inputs"]["a"] == "mine"
    memory = spectra.Spectra(runs[0])
    similar(memory, memory, top=3, out=tmp_path / "memory")
    assert json.loads((tmp_path / "memory/run.json").read_text())["inputs"]["a"] is None


def test_vectors_that_are_not_loaded_are_a_reason_not_a_crash(tmp_path, source):
    spectra.decompose(source.select(NAME), top=3, out=tmp_path / "run").collect()
    values = spectra.load(tmp_path / "run", vectors=False)
    (item,) = spectra.compare(values, values)
    assert item.reason.endswith("its vectors are not loaded; load them with vectors=True")
    assert not item.one_sided


def test_the_representation_says_whether_it_has_begun():
    found = spectra.decompose(slow_deltas(1, delay=0.0), device="cpu")
    assert repr(found) == "Decomposition(1 matrix)"
    assert np.isfinite(next(found).S).all()
    assert repr(found) == "Decomposition(1 matrix, begun)"


def test_paths_are_opened(tmp_path):
    lora_folder(tmp_path / "a", seed=1)
    lora_folder(tmp_path / "b", seed=2)
    found = spectra.decompose(str(tmp_path / "a"), top=3, out=tmp_path / "run-a").collect()
    spectra.decompose(tmp_path / "b", top=3, out=tmp_path / "run-b").collect()
    assert found.names == spectra.open_source(tmp_path / "a").names
    of_models = [item.phi for item in spectra.compare(tmp_path / "a", tmp_path / "b", top=2)]
    of_runs = [item.phi for item in spectra.compare(str(tmp_path / "run-a"), tmp_path / "run-b", top=2)]
    assert np.allclose(of_models, of_runs, atol=1e-9)
    assert len(of_runs) == 2
    of_both = [item.phi for item in spectra.compare(tmp_path / "run-a", tmp_path / "b", top=2)]
    assert np.allclose(of_models, of_both, atol=1e-9), "a stored run is what it was made of"
    with pytest.raises(SelectionError, match="two of a kind"):
        spectra.compare(found, tmp_path / "b")


def test_what_is_given_in_the_wrong_place_is_told_where_it_belongs(tmp_path):
    source = spectra.open_source(lora_folder(tmp_path / "a", seed=1))
    found = spectra.decompose(source, out=tmp_path / "run").collect()
    with pytest.raises(SelectionError, match=r"holds results already: load\('.*run'\)"):
        spectra.decompose(tmp_path / "run")
    with pytest.raises(SelectionError, match=r"spectra already; decompose takes a source: open_source"):
        spectra.decompose(found)
    with pytest.raises(SelectionError, match=r"given WeightDelta: summarize\(decompose\(source\)\)"):
        spectra.summarize(source)
    with pytest.raises(SelectionError, match=r"load\('run'\) where results are stored there, decompose\('run'\)"):
        spectra.summarize("run")
    assert len(spectra.summarize(spectra.decompose(source))) == 2
