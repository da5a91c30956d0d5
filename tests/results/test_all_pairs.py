"""`compare_all`: the pairs of several updates against `compare`, each decomposed once, stored and resumed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from support import reading
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder, run, strict, table

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.errors import SelectionError, StoreError
from spectra.results.pairs import clustered

LABELS = "abcd"


@pytest.fixture
def reads(monkeypatch):
    """How often each matrix of each file is read from now on."""
    seen = Counter()
    reading.watch(monkeypatch, lambda delta: seen.update([delta.refs[0]]))
    return seen


@pytest.fixture
def sources(tmp_path):
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    for seed, label in enumerate(LABELS, start=1):
        write_checkpoint(tmp_path / label, nudged(base, seed=seed))
    opened = {label: spectra.open_source(tmp_path / label, tmp_path / "base") for label in LABELS}
    return {label: source.select(["q_proj", "v_proj"]) for label, source in opened.items()}


def phis(stream):
    return {(pair.a, pair.b, pair.outcome.name, pair.outcome.side): pair.outcome.phi for pair in stream}


def test_every_pair_is_what_compare_gives_and_each_matrix_is_read_once(sources, reads):
    found = phis(spectra.compare_all(sources, top=3, sides=("left", "right")))
    assert set(reads.values()) == {1}
    assert len(reads) == 4 * 4
    slow = {
        (a, b, item.name, item.side): item.phi
        for a, b in combinations(LABELS, 2)
        for item in spectra.compare(sources[a], sources[b], top=3, sides=("left", "right"))
    }
    assert found.keys() == slow.keys()
    assert found == pytest.approx(slow)


def test_what_is_stored_is_not_computed_again_and_new_updates_join(sources, reads, tmp_path):
    three = {label: sources[label] for label in "abc"}
    first = phis(spectra.compare_all(three, top=3, out=tmp_path / "sim"))
    reads.clear()
    assert phis(spectra.compare_all(three, top=3, out=tmp_path / "sim")) == first
    assert not reads
    lost = next((tmp_path / "sim/pairs").glob("a~b~*/similarity/*layers.1*v_proj*"))
    lost.unlink()
    assert phis(spectra.compare_all(three, top=3, out=tmp_path / "sim")) == pytest.approx(first)
    assert len(reads) == 2, "only the two updates of the lost pair, and of that matrix"
    everything = phis(spectra.compare_all(sources, top=3, out=tmp_path / "sim"))
    assert {key: everything[key] for key in first} == pytest.approx(first)
    assert len(json.loads((tmp_path / "sim/run.json").read_text())["pairs"]) == 6
    with pytest.raises(StoreError, match="different: top"):
        list(spectra.compare_all(three, top=2, out=tmp_path / "sim"))


def test_a_stopped_run_keeps_what_was_finished(sources, reads, tmp_path):
    stream = spectra.compare_all(sources, top=3, out=tmp_path / "sim", device="cpu")
    got = [next(stream) for _ in range(6)]
    stream.close()
    stored = list((tmp_path / "sim/pairs").glob("*/similarity/*.safetensors"))
    assert len(stored) >= len(got)
    reads.clear()
    again = phis(spectra.compare_all(sources, top=3, out=tmp_path / "sim"))
    assert len(again) == 6 * 4
    assert sum(reads.values()) < 16


def test_a_run_that_was_killed_before_its_tables_writes_them_though_nothing_is_missing(sources, tmp_path):
    list(spectra.compare_all(sources, top=3, out=tmp_path / "out"))
    undisturbed = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/pairs").glob("*/run.json"))]
    tables = sorted((tmp_path / "out/pairs").glob("*/similarity.csv"))
    right = tables[0].read_bytes()
    tables[0].unlink()
    list(spectra.compare_all(sources, top=3, out=tmp_path / "out"))
    assert tables[0].read_bytes() == right
    again = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/pairs").glob("*/run.json"))]
    assert [run["tables"] for run in again] == [run["tables"] for run in undisturbed]
    assert all(run["finished"] for run in again)


@pytest.mark.parametrize("which", ["run.json", "pairs/*/run.json"])
def test_a_damaged_run_file_is_said_and_written_anew(sources, tmp_path, which):
    out = tmp_path / "out"
    first = phis(spectra.compare_all(sources, top=3, out=out))
    pairs = json.loads((out / "run.json").read_text())["pairs"]
    for path in out.glob(which):
        path.write_text("{")
    notes: list[str] = []
    three = {label: sources[label] for label in "abc"}
    found = phis(spectra.compare_all(three, top=3, out=out, notes=notes))
    assert found == {key: value for key, value in first.items() if "d" not in key[:2]}
    assert any("run.json was damaged" in line for line in notes)
    if which == "run.json":
        assert json.loads((out / which).read_text())["pairs"] == pairs, "the pairs of other updates stay known"


def test_a_damaged_comparison_is_said_and_made_again(sources, tmp_path):
    first = phis(spectra.compare_all(sources, top=3, out=tmp_path / "out"))
    file = sorted((tmp_path / "out/pairs").glob("*/similarity/*"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    notes: list[str] = []
    assert phis(spectra.compare_all(sources, top=3, out=tmp_path / "out", notes=notes)) == first
    assert len(notes) == 1
    assert file.name in notes[0]


def test_each_pair_is_a_results_directory_like_that_of_compare(sources, tmp_path):
    list(spectra.compare_all({label: sources[label] for label in "abc"}, top=3, out=tmp_path / "sim"))
    list(spectra.compare(sources["a"], sources["b"], top=3, out=tmp_path / "two"))
    pair = next((tmp_path / "sim/pairs").glob("a~b~*"))
    assert table(pair / "similarity.csv") == table(tmp_path / "two/similarity.csv")


def test_paths_are_opened(tmp_path):
    for seed, name in enumerate("abc", start=1):
        lora_folder(tmp_path / name, seed=seed)
    found = phis(spectra.compare_all({name: tmp_path / name for name in "abc"}, top=2))
    assert found == phis(spectra.compare_all({name: spectra.open_source(tmp_path / name) for name in "abc"}, top=2))


def test_stored_spectra_are_compared_and_kept_too(sources, tmp_path):
    runs = {}
    for label in "abc":
        spectra.decompose(sources[label], top=4, out=tmp_path / f"run-{label}").collect()
        runs[label] = spectra.load(tmp_path / f"run-{label}")
    found = phis(spectra.compare_all(runs, top=3, out=tmp_path / "sim"))
    assert found == pytest.approx(
        phis(spectra.compare_all({label: sources[label] for label in "abc"}, top=3)),
        abs=1e-7,  # float32
    )
    assert len(list((tmp_path / "sim/pairs").iterdir())) == 3


def test_what_is_stored_is_loaded_and_drawn_again(sources, tmp_path):
    computed = spectra.Pairs(
        spectra.compare_all(
            {label: sources[label] for label in "abc"}, top=3, sides=("left", "right"), out=tmp_path / "sim"
        )
    )
    loaded = spectra.load_pairs(tmp_path / "sim")
    assert loaded.labels == computed.labels == ("a", "b", "c")
    assert {str(row) for row in loaded.rows()} == {str(row) for row in computed.rows()}
    assert spectra.load_pairs(tmp_path / "sim", layers="v_proj", sides=("right",)).groups("role") == ["v_proj"]
    out, _ = run("plot", tmp_path / "sim", "--out", tmp_path / "figures", "--layer", "v_proj")
    assert {line.rpartition("/")[2] for line in out.splitlines()} >= {"similarity_by_layer.png", "similarity.png"}
    with pytest.raises(StoreError, match="no comparison of several updates"):
        spectra.load_pairs(tmp_path / "a")


def test_strangers_one_update_and_two_kinds_are_refused(sources):
    with pytest.raises(SelectionError, match="give two or more"):
        spectra.compare_all({"a": sources["a"]})
    found = spectra.decompose(sources["a"], top=2).collect()
    with pytest.raises(SelectionError, match="of a kind"):
        spectra.compare_all({"a": sources["a"], "b": found})
    strange = {name: [WeightDelta.from_tensor(name, torch.eye(3))] for name in "xyz"}
    with pytest.raises(SelectionError, match="no two of the updates share a matrix"):
        list(spectra.compare_all(strange))


def planted():
    """Four updates of two matrices: b is a, c is a in one matrix only, d lacks the other matrix."""
    eye = np.eye(6)

    def delta(name, columns):
        return WeightDelta.from_factors(name, torch.as_tensor(eye[:, columns] * [3.0, 2.0]), torch.eye(2, 6).double())

    one, two = "layers.0.q_proj.weight", "layers.1.v_proj.weight"
    a = [delta(one, [0, 1]), delta(two, [0, 1])]
    return {"a": a, "c": [delta(one, [2, 3]), delta(two, [0, 1])], "b": a, "d": [delta(one, [4, 1])]}


def test_planted_pairs_come_out_exactly():
    ordered = spectra.Pairs(spectra.compare_all(planted(), top=2), labels=list("abcd"))
    expected = [[1, 1, 0.5, 0.5], [1, 1, 0.5, 0.5], [0.5, 0.5, 1, 0], [0.5, 0.5, 0, 1]]
    assert ordered.square() == pytest.approx(np.array(expected, float))
    roles = {(row["a"], row["b"], row["role"]): row["phi"] for row in ordered.pooled("role")}
    assert (roles["a", "c", "q_proj"], roles["a", "c", "v_proj"]) == pytest.approx((0, 1))
    assert ordered.square("left", "layer", 1)[3, :3] == pytest.approx(np.full(3, np.nan), nan_ok=True)
    assert ordered.square(value="chance")[0, 1] == pytest.approx(2 / 6)
    assert {pair.outcome.reason for pair in ordered.one_sided} == {f"only in {label}" for label in "abc"}
    assert ordered.failed == []


def test_the_pooled_mean_is_that_of_pool_where_ranks_differ():
    def updates(seed):
        rng = np.random.default_rng(seed)
        return [
            WeightDelta.from_factors(
                f"layers.{i}.v_proj.weight", torch.as_tensor(rng.standard_normal((9, rank))),
                torch.as_tensor(rng.standard_normal((rank, 7))),
            )
            for i, rank in enumerate((2, 4))
        ]  # fmt: skip

    found = {name: updates(seed) for seed, name in enumerate("abc")}
    rows = spectra.Pairs(spectra.compare_all(found, top=5)).pooled("role")
    (row,) = [row for row in rows if row["a"] + row["b"] == "ac"]
    (wanted,) = spectra.pool_by_role(spectra.compare(found["a"], found["c"], top=5))
    assert (row["k_used"], row["phi"], row["chance"]) == pytest.approx((2, wanted.phi, wanted.chance[-1, -1]))


def test_clustered_order_puts_likes_together():
    rng = np.random.default_rng(1)
    groups = rng.permutation(np.repeat(np.arange(3), 4))
    similarity = np.where(groups[:, None] == groups, 0.8, 0.1) + 0.01 * rng.random((12, 12))
    similarity = (similarity + similarity.T) / 2
    order = clustered(similarity)
    assert sorted(order) == list(range(12))
    assert (np.diff(groups[order]) != 0).sum() == 2
    assert clustered(np.eye(2)) == [0, 1]


def names_in(out):
    return [line.split()[1] for line in out.splitlines()[2:6]]


def test_the_command_prints_stores_and_draws_every_pair(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["similarity", "a", "b", "c", "--base", "base", "--layer", "v_proj", "--top", 3]
    out, err = run(*words, "--out", "sim")
    assert max(map(len, out.splitlines())) <= 80
    assert "chance" in out
    for name in ("similarity.png", "similarity_by_layer.png", "pairs.csv", "pooled.csv", "similarity_squares.csv"):
        assert f"sim/{name}" in err
        assert (tmp_path / "sim" / name).stat().st_size
    document = strict(run(*words, "--json")[0])
    assert {(pair["a"], pair["b"]) for pair in document["pairs"]} == set(combinations("abc", 2))
    assert len(document["pairs"]) == 3 * 2
    assert set(document["pairs"][0]) >= {"a", "b", "name", "side", "k_used", "phi", "chance"}
    assert {(row["a"], row["b"], row["role"]) for row in document["pooled"]} == {
        (a, b, "v_proj") for a, b in combinations("abc", 2)
    }
    two = strict(run("similarity", "a", "c", "--base", "base", "--layer", "v_proj", "--top", 3, "--json")[0])
    phi = {row["name"]: row["phi"] for row in document["pairs"] if (row["a"], row["b"]) == ("a", "c")}
    assert phi == pytest.approx({row["name"]: row["phi"] for row in two["matrices"]})
    assert two["pairs"][0]["phi"] == two["matrices"][0]["phi"]
    assert two["pooled"][0]["phi"] == pytest.approx(np.mean(list(phi.values())))
    square = document["matrices"][0]
    assert square["phi"][0][2] == square["phi"][2][0] == pytest.approx(phi[square["name"]])


def test_what_the_pairs_notes_say_is_said_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc", start=1):
        lora_folder(tmp_path / name, seed=seed)
    _, err = run("similarity", *"abc")
    (line,) = [line for line in err.splitlines() if line.startswith("note:")]
    assert "k clamped from 30 to 4" in line
    assert line.endswith("and 4 more")
    write_checkpoint(tmp_path / "base", llama_tensors())
    for seed, name in enumerate(("right", "wrong", "alien")):
        tensors = nudged(llama_tensors(), seed=5) if name == "right" else llama_tensors(seed=seed)
        write_checkpoint(tmp_path / name, tensors)
    _, err = run("similarity", "right", "wrong", "alien", "--base", "base", "--layer", "v_proj", "--top", 2)
    assert "note: first and second update unrelated to the base: wrong, alien: " in err


def test_clustered_order_on_the_command_line_and_misuse(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = llama_tensors()
    write_checkpoint(tmp_path / "like-a", {name: t + 1.1 * (nudged(base)[name] - t) for name, t in base.items()})
    words = ["--base", "base", "--layer", "v_proj", "--top", 2]
    out, _ = run("similarity", "a", "b", "c", "like-a", *words, "--cluster-order")
    order = names_in(out)
    assert abs(order.index("a") - order.index("like-a")) == 1
    document = strict(run("similarity", "a", "b", "c", "like-a", *words, "--cluster-order", "--json")[0])
    assert document["order"] == order
    assert "given twice" in run("similarity", "a", "b", "a", status=2)[1]
    assert "two or more" in run("similarity", "a", status=2)[1]
    assert "--against needs --layer" in run("similarity", "a", "--against", "q_proj", status=2)[1]
