"""Stored numbers are what was stored, or they are not given: flips, hand-made records, renamed files, older stores."""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file
from support.spectra_kinds import same_spectrum

import spectra
from spectra.cli.main import main
from spectra.errors import StoreError
from spectra.plots.stored import draw_results
from spectra.results import run_file, shelf
from spectra.results.store import Store
from spectra.spectrum import Spectrum

VECTORS = "layers.10.v_proj.weight"


def made():
    rng = np.random.default_rng(0)
    U = rng.standard_normal((3, 2)).astype(np.float32)  # as it is stored
    return [
        Spectrum(VECTORS, (3, 2), S=[2.0, 0.1], U=U, Vh=np.eye(2), method="x"),
        Spectrum("layers.9.v_proj.weight", (3, 2), "unchanged", S=np.zeros(2), unmoved_share=1.0),
        Spectrum("b.weight", (3, 2), "nonfinite", reason="2 entries are NaN"),
    ]


@pytest.fixture
def stored(tmp_path):
    spectra.save(made(), tmp_path / "run")
    loaded = spectra.load(tmp_path / "run")
    store = Store(tmp_path / "run")
    store.put_similarity(spectra.subspace_similarity(loaded[VECTORS], loaded[VECTORS], top=2))
    store.finish()
    return tmp_path / "run"


def test_every_flipped_bit_is_found_or_harmless(stored):
    right = {spectrum.name: spectrum for spectrum in made()}
    (compared,) = Store(stored).similarities()
    rng = random.Random(1)
    files = sorted(path for path in stored.rglob("*") if path.is_file())
    assert len(files) == 7
    found = 0
    for file in files:
        content = file.read_bytes()
        for _ in range(60):
            place = rng.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            file.write_bytes(flipped)
            states = {item.file: item.state for item in spectra.check_results(stored)}
            noticed = "damaged" in states.values()
            found += noticed
            if file.suffix == ".safetensors":
                assert noticed
            for name, spectrum in right.items():
                try:
                    same_spectrum(spectra.load(stored)[name], spectrum)
                except StoreError:
                    assert noticed
            try:
                assert (Store(stored).similarities()[0].grid == compared.grid).all()
            except StoreError:
                assert noticed
        file.write_bytes(content)
    assert found > 300
    assert {item.state for item in spectra.check_results(stored)} == {"sound"}


def _resigned(path, **changed):
    """The file with another record, rightly signed: what a hand-made file would be."""
    with safe_open(path, framework="np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["signed"])
    said["record"] = json.dumps(json.loads(said["record"]) | changed)
    said.pop("checksum")
    save_file(arrays, path, shelf.signed(said))


@pytest.mark.parametrize(
    "changed",
    [
        {"status": "fine"}, {"status": []}, {"k": 7}, {"values": -1}, {"values": 1}, {"shape": [3, 3]}, {"shape": "32"},
        {"shape": [10**30, 2]}, {"max_rank": "x"}, {"key": None}, {"name": "other"}, {"norm": None}, {"norm": True},
        {"moved": [1]}, {"method": 3}, {"k": 1.0}, {"base_rounding": 0},
    ],
)  # fmt: skip
def test_a_record_that_does_not_fit_counts_as_not_stored(stored, changed):
    path = Store(stored).spectra.path(VECTORS)
    _resigned(path)
    same_spectrum(spectra.load(stored)[VECTORS], made()[0])
    _resigned(path, **changed)
    with pytest.raises(StoreError, match=r"v_proj.weight.safetensors is missing or damaged .*computes it anew"):
        spectra.load(stored)[VECTORS]
    spectra.save(made(), stored)  # a damaged one does not stand in the way of a sound one
    same_spectrum(spectra.load(stored)[VECTORS], made()[0])


@pytest.mark.parametrize("name", ["%FF", "%E2%82", "%ED%A0%80%FF"])
def test_a_file_that_is_called_as_no_record_is_leaves_the_others_alone(stored, name):
    shutil.copy(Store(stored).spectra.path(VECTORS), stored / "spectra" / f"{name}.safetensors")
    shutil.copy(next((stored / "similarity").iterdir()), stored / "similarity" / f"{name}.safetensors")
    assert len(spectra.load(stored)) == 3
    assert len(Store(stored).similarities()) == 1
    states = {item.file: item.state for item in spectra.check_results(stored)}
    assert [file for file, state in states.items() if state == "damaged"] == [
        f"{shelf}/{name}.safetensors" for shelf in ("spectra", "similarity")
    ]


def test_an_integer_that_int64_does_not_hold_is_a_real_number(stored, tmp_path):
    _resigned(Store(stored).spectra.path(VECTORS), noise_edge=10**30)
    assert np.log(spectra.load(stored)[VECTORS].noise_edge) == pytest.approx(30 * np.log(10))
    assert draw_results([stored], tmp_path / "figure", formats=("png",))


@pytest.mark.parametrize("changed", [{"name": ""}, {"side": "right"}, {"other": "layers.9.v_proj.weight"}])
def test_a_comparison_that_does_not_fit_its_place_counts_as_not_stored(stored, changed):
    (path,) = (stored / "similarity").iterdir()
    _resigned(path, **changed)
    with pytest.raises(StoreError, match="the record of another comparison"):
        Store(stored).similarities()
    assert "damaged" in {item.state for item in spectra.check_results(stored)}


@pytest.mark.parametrize("deep", ['{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 100_000, "3", "NaN", '"x"'])
def test_a_run_file_that_says_nothing_is_damaged_and_the_rest_loads(stored, deep):
    (stored / "run.json").write_text(deep)
    with pytest.raises(StoreError, match=r"run.json is damaged .*writes it anew"):
        Store(stored).run()
    assert len(spectra.load(stored)) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"pairs": {"a~b": None}}, {"pairs": {"a~b": ["a"]}}, {"pairs": []}, {"coverage": {"skipped": 3}},
        {"coverage": {"unsupported": []}}, {"coverage": {"warnings": {"a": "b"}}},
        {"methods": [1]}, {"versions": {"torch": []}}, {"command": "spectra"}, {"started": 5}, {"tables": None},
        {"top": "all"}, {"inputs": {"options": {"heads": []}}}, {"inputs": {"options": {"split": "no"}}},
        {"inputs": {"tuned": 4}}, {"inputs": {"files": {"x": {"size": [1]}}}}, {"inputs": [1]},
    ],
)  # fmt: skip
def test_a_run_file_whose_fields_are_not_of_their_kind_is_damaged(stored, changed):
    run = Store(stored).run()
    run_file.write(stored / "run.json", run)
    assert Store(stored).run() == run
    run_file.write(stored / "run.json", run | changed)
    with pytest.raises(StoreError, match=r"run.json is damaged \(its .* is .*writes it anew"):
        Store(stored).run()
    for words in (
        ["inspect", str(stored), "--verify"],
        ["plot", str(stored)],
        ["report", str(stored), "--out", "p.html"],
    ):
        shown = CliRunner().invoke(main, words)
        assert isinstance(shown.exception, SystemExit | None), words


def test_vectors_are_checked_when_they_are_read_and_the_hurried_may_not_care(stored):
    path = Store(stored).spectra.path(VECTORS)
    content = bytearray(path.read_bytes())
    with safe_open(path, framework="np") as file:
        size = file.get_tensor("Vh").nbytes
    content[-size] ^= 1  # arrays lie in the order of their names
    path.write_bytes(content)
    assert spectra.load(stored, vectors=False)[VECTORS].S[0] == 2.0
    with pytest.raises(StoreError, match="checksum of Vh"):
        spectra.load(stored)[VECTORS]
    assert spectra.load(stored, verify=False)[VECTORS].Vh.shape == (2, 2)


def test_a_renamed_file_is_not_another_matrix(stored):
    store = Store(stored).spectra
    shutil.copy(store.path(VECTORS), store.path("layers.11.v_proj.weight"))
    with pytest.raises(StoreError, match="another record, renamed"):
        spectra.load(stored)["layers.11.v_proj.weight"]
    assert [item.file for item in spectra.check_results(stored) if item.state == "damaged"] == [
        "spectra/layers.11.v_proj.weight.safetensors"
    ]


def test_what_was_stored_before_there_were_checksums_is_read_and_said(stored):
    for path in stored.rglob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            save_file(arrays, path, {"record": json.loads(file.metadata()["signed"])["record"]})
    run = json.loads((stored / "run.json").read_text())
    (stored / "run.json").write_text(json.dumps({key: run[key] for key in ("finished", "methods")}))
    for spectrum in made():
        same_spectrum(spectra.load(stored)[spectrum.name], spectrum)
    assert {item.state for item in spectra.check_results(stored)} == {"no checksum"}
    shown = CliRunner().invoke(main, ["inspect", str(stored), "--verify"])
    assert shown.exit_code == 0
    assert "5 files: 5 no checksum" in shown.output
    assert "before there were any" in shown.output


def test_a_pipe_in_a_store_is_no_result_and_nobody_waits_for_it(stored):
    path = Store(stored).spectra.path(VECTORS)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="missing or damaged"):
        spectra.load(stored)[VECTORS]


def test_the_next_run_says_what_is_damaged_and_computes_it_again(tmp_path, source):
    out = tmp_path / "run"
    list(spectra.decompose(source, out=out))
    right = (out / "summary.csv").read_bytes()
    path = Store(out).spectra.path(source.deltas[3].name)
    path.write_bytes(path.read_bytes()[:-1])
    (out / "run.json").write_text("{")
    (out / "summary.csv").write_text("name\n")
    shown = CliRunner().invoke(main, ["inspect", str(out), "--verify"])
    assert shown.exit_code == 1
    assert "damaged: run.json" in shown.output
    stream = spectra.decompose(source, out=out)
    assert len(list(stream)) == len(source)
    assert len(stream.reused) == len(source) - 1
    assert ["run.json was damaged" in line for line in stream.notes].count(True) == 1
    assert any(path.name in line and "computed again" in line for line in stream.notes)
    assert (out / "summary.csv").read_bytes() == right
    assert {item.state for item in spectra.check_results(out)} == {"sound"}


def test_a_damaged_run_file_does_not_let_other_results_join(tmp_path, source):
    out = tmp_path / "run"
    list(spectra.decompose(source, out=out))
    (out / "run.json").write_text("{")
    with pytest.raises(StoreError, match="not all that is stored there is of these inputs"):
        list(spectra.decompose(source.select("q_proj"), out=out))


def test_comparisons_are_made_again_where_they_are_damaged(tmp_path, source):
    out = tmp_path / "run"
    first = [item.phi for item in spectra.compare(source, source, top=2, out=out)]
    path = sorted((out / "similarity").iterdir())[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    (out / "run.json").write_text("[]")
    again = spectra.compare(source, source, top=2, out=out)
    assert sorted(item.phi for item in again) == sorted(first)
    assert len(again.reused) == len(first) - 1
    assert any("compared again" in line for line in again.notes)


@pytest.mark.parametrize("also_struck", [False, True])
def test_a_checksum_whose_name_is_damaged_is_damage(stored, also_struck):
    """It would else pass for a file of before there were any."""
    path = stored / "run.json"
    text = path.read_text().replace('"checksum"', '"chec+sum"')
    if also_struck:
        checksum = json.loads(text)["chec+sum"]
        text = text.replace(checksum, "n" + checksum[1:])
    path.write_text(text)
    assert {item.file: item.state for item in spectra.check_results(stored)}["run.json"] == "damaged"
    with pytest.raises(StoreError, match=r"run.json is damaged \(its checksum has lost its name\)"):
        run_file.read(path)
