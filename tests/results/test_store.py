"""A results directory: what is resumed, what is refused, and what is never lost."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import reading
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.spectra_kinds import same_spectrum

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.errors import StoreError
from spectra.results import records, shelf, writing
from spectra.results.store import Store
from spectra.spectrum import Spectrum


def computed(monkeypatch):
    """Names of the deltas that are read from now on."""
    names = []
    reading.watch(monkeypatch, lambda delta: names.append(delta.name))
    return names


def run(out, source, **options):
    return {spectrum.name: spectrum for spectrum in spectra.decompose(source, out=out, **options)}


def test_the_same_run_again_computes_nothing_and_says_the_same(tmp_path, source, monkeypatch):
    first = run(tmp_path / "run", source, top=3)
    names = computed(monkeypatch)
    again = run(tmp_path / "run", source, top=3)
    assert names == []
    assert set(again) == set(first) == {delta.name for delta in source}
    for name in first:
        same_spectrum(first[name], again[name])


def test_only_what_is_missing_or_damaged_is_computed(tmp_path, source, monkeypatch):
    run(tmp_path / "run", source)
    shelf = Store(tmp_path / "run").spectra
    gone, damaged = source.deltas[0].name, source.deltas[3].name
    shelf.path(gone).unlink()
    shelf.path(damaged).write_bytes(b"half a fi")
    names = computed(monkeypatch)
    assert len(run(tmp_path / "run", source)) == len(source)
    assert sorted(names) == sorted([gone, damaged])


def test_more_is_computed_when_asked_for_and_less_never_replaces_it(tmp_path, source, monkeypatch):
    run(tmp_path / "run", source)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert run(tmp_path / "run", source, top=3)[name].k == 3
    names = computed(monkeypatch)
    assert run(tmp_path / "run", source)[name].k == 3
    assert run(tmp_path / "run", source, top=2)[name].k == 3
    assert names == []
    Store(tmp_path / "run").spectra.path(name).unlink()
    run(tmp_path / "run", source)
    assert names == [name]


def test_another_layer_joins_the_same_run(tmp_path, source):
    run(tmp_path / "run", source.select("v_proj"))
    run(tmp_path / "run", source.select("q_proj"))
    assert len(spectra.load(tmp_path / "run")) == 4
    table = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    assert len(table) == 5


def test_other_inputs_are_refused_and_nothing_is_touched(tmp_path, source):
    run(tmp_path / "run", source)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    write_checkpoint(tmp_path / "other", nudged(llama_tensors(), seed=5))
    other = spectra.open_source(tmp_path / "other", tmp_path / "base")
    with pytest.raises(StoreError, match=r"results of other inputs \(different: tuned\).*out=, --out"):
        run(tmp_path / "run", other)
    write_checkpoint(tmp_path / "tuned", nudged(llama_tensors(), seed=6))
    changed = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    with pytest.raises(StoreError, match="different: files"):
        run(tmp_path / "run", changed)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_files_of_other_layers_have_to_be_as_they_were(tmp_path):
    """A model that was saved again in other shards must not join the results of the old one."""
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", nudged(base), shards=3)
    old = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    run(tmp_path / "run", old.select("layers.0.self_attn.q_proj"))
    for file in (tmp_path / "tuned").iterdir():
        file.unlink()
    write_checkpoint(tmp_path / "tuned", nudged(base, seed=7), shards=2)
    new = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    with pytest.raises(StoreError, match="different: files"):
        run(tmp_path / "run", new.select("layers.1.self_attn.q_proj"))


def test_run_json_tells_where_the_numbers_came_from(tmp_path, source):
    run(tmp_path / "run", source, top=2)

    def refuse(token):
        raise AssertionError(f"{token} is not strict JSON")

    record = json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=refuse)
    assert set(record["versions"]) == {"spectra", "torch", "numpy", "python"}
    assert set(record["methods"]) == {delta.name for delta in source}
    assert all(record["methods"].values())
    (entry,) = [value for path, value in record["inputs"]["files"].items() if "tuned" in path]
    assert entry["size"] == (tmp_path / "tuned" / "model.safetensors").stat().st_size
    assert len(entry["head_sha256"]) == 64
    assert record["coverage"]["skipped"]["model.norm.weight"]


def test_what_was_found_of_the_rounding_comes_back_and_results_from_before_still_load(tmp_path, monkeypatch):
    found = Spectrum("a.weight", (3, 3), S=[2.0, 1.0, 0.5], noise_edge=0.7, noise_energy=0.3, rounding="on bf16's grid")
    Store(tmp_path / "new").put(found)
    same_spectrum(Store(tmp_path / "new").get("a.weight"), found)
    older = {name: said for name, said in records.RECORDED.items() if name not in ("noise_energy", "rounding")}
    monkeypatch.setattr(records, "RECORDED", older)
    Store(tmp_path / "old").put(found)
    monkeypatch.undo()
    same_spectrum(Store(tmp_path / "old").get("a.weight"), replace(found, noise_energy=None, rounding=""))


def test_similarities_come_back(tmp_path):
    torch.manual_seed(0)
    pair = [WeightDelta.from_tensor("w", torch.randn(5, 4)) for _ in range(2)]
    one, other = (next(iter(spectra.decompose([delta], top=3))) for delta in pair)
    similarity = spectra.subspace_similarity(one, other, top=3, side="right")
    Store(tmp_path).put_similarity(similarity)
    (back,) = Store(tmp_path).similarities()
    assert (back.name, back.side, back.k_used, back.note) == ("w", "right", 3, similarity.note)
    assert back.gap == similarity.gap > 0
    unknown = replace(similarity, gap=float("nan"))
    Store(tmp_path).put_similarity(unknown)
    assert np.isnan(Store(tmp_path).similarities()[0].gap)
    assert np.array_equal(back.grid, similarity.grid)
    assert np.array_equal(back.angles, similarity.angles)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    spectra.save([Spectrum("w", (1, 1), S=[1.0])], tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    with pytest.raises(StoreError, match=r"cannot be written \(No space left on device\)"):
        spectra.save([Spectrum("w", (1, 1), S=[2.0])], tmp_path / "run")
    monkeypatch.undo()
    assert spectra.load(tmp_path / "run")["w"].S[0] == 1.0
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_many_small_results_are_not_read_again_for_the_table_unless_they_are_others(tmp_path, source, monkeypatch):
    read = []
    piece = shelf.read_piece
    monkeypatch.setattr(shelf, "read_piece", lambda path, *a, **k: (read.append(path.name), piece(path, *a, **k))[1])
    stream = spectra.decompose(source, out=tmp_path / "run")
    found = [next(stream)]
    found += stream
    assert read == []
    table = (tmp_path / "run" / "summary.csv").read_bytes()
    list(spectra.decompose(source, out=tmp_path / "run"))
    assert len(read) == len(source)
    assert (tmp_path / "run" / "summary.csv").read_bytes() == table
    again = spectra.decompose(source, out=tmp_path / "run")
    first = next(again)
    Store(tmp_path / "run").put(replace(first, note="written by another"), "another key")
    list(again)
    assert b"written by another" in (tmp_path / "run" / "summary.csv").read_bytes()


def test_of_results_that_come_quickly_few_wait_for_the_disk_and_the_slow_ones_all_do(tmp_path, source, monkeypatch):
    waited = []
    monkeypatch.setattr(writing.os, "fsync", waited.append)
    list(spectra.decompose(source, out=tmp_path / "quick"))
    quick = len(waited)
    monkeypatch.setattr(shelf, "_SYNCED_EVERY", -1.0)
    list(spectra.decompose(source, out=tmp_path / "slow"))
    assert len(waited) - quick == len(source) + 3 > quick  # run.json twice, and the table


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "make room"), (errno.EFBIG, "ulimit -f"), (errno.ENAMETOOLONG, "shorten"), (errno.EACCES, "user")],
)
def test_a_disk_that_refuses_is_answered_by_what_helps(number, cure):
    assert cure in str(writing.not_written(Path("out/run.json"), OSError(number, os.strerror(number))))
