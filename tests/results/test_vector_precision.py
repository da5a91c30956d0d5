"""Vectors are kept in float32 unless float64 is asked for: what that loses, and what resumes from what."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.spectra_kinds import same_spectrum

import spectra
from spectra.cli.main import main
from spectra.errors import SelectionError
from spectra.metrics import measuring
from spectra.results import measured, shelf
from spectra.results.store import Store

TOP = 4


@pytest.fixture
def other(tmp_path, source):
    """Another fine-tune of the same base."""
    write_checkpoint(tmp_path / "other", nudged(llama_tensors(), seed=9))
    return spectra.open_source(tmp_path / "other", tmp_path / "base")


def run(out, source, **options):
    return {spectrum.name: spectrum for spectrum in spectra.decompose(source, top=TOP, out=out, **options)}


def kept_in(out):
    """What each stored file holds U in."""
    found = []
    for path in sorted((out / "spectra").iterdir()):
        with safe_open(path, framework="np") as file:
            found.append(str(file.get_tensor("U").dtype))
    return set(found)


def test_values_are_the_same_bits_and_no_phi_differs_by_a_millionth(tmp_path, source, other):
    run(tmp_path / "a", source)
    run(tmp_path / "b", other)
    exact = [spectra.decompose(one, top=TOP).collect() for one in (source, other)]
    kept = [spectra.load(tmp_path / name) for name in "ab"]
    for one, two in zip(exact, kept, strict=True):
        for spectrum in one:
            back = two[spectrum.name]
            assert (back.S == spectrum.S).all()
            assert back.U.dtype == back.Vh.dtype == np.float64
            assert 0 < np.abs(back.U - spectrum.U).max() <= 2**-24
    for side in ("left", "right"):
        right = {item.name: item for item in spectra.compare(*exact, top=TOP, sides=(side,))}
        for item in spectra.compare(*kept, top=TOP, sides=(side,)):
            assert np.abs(item.grid - right[item.name].grid).max() < 1e-6
            assert np.abs(item.angles - right[item.name].angles).max() < 1e-6
    itself = next(spectra.compare(kept[0], exact[0], top=TOP))
    assert itself.phi == pytest.approx(1, abs=1e-6)
    assert itself.angles.max() < 1e-6


def test_the_stream_gives_what_will_be_loaded_and_half_of_the_bytes_are_there(tmp_path, source):
    found = run(tmp_path / "small", source)
    run(tmp_path / "large", source, vectors="float64")
    assert (kept_in(tmp_path / "small"), kept_in(tmp_path / "large")) == ({"float32"}, {"float64"})
    for spectrum in spectra.load(tmp_path / "small"):
        same_spectrum(spectrum, found[spectrum.name])
    whole = spectra.decompose(source, top=TOP).collect()
    for spectrum in spectra.load(tmp_path / "large"):
        same_spectrum(spectrum, whole[spectrum.name])
    small, large = (sum(file.stat().st_size for file in (tmp_path / name / "spectra").iterdir())
                    for name in ("small", "large"))  # fmt: skip
    vectors = sum(4 * TOP * sum(spectrum.shape) for spectrum in whole)
    assert large - small == pytest.approx(vectors, rel=0.02)
    assert (tmp_path / "small/summary.csv").read_bytes() == (tmp_path / "large/summary.csv").read_bytes()


def test_float32_is_computed_again_for_float64_and_said_and_never_the_other_way_round(tmp_path, source):
    out = tmp_path / "run"
    run(out, source.select("v_proj"))
    again = spectra.decompose(source, top=TOP, out=out, vectors="float64")
    assert len(list(again)) == len(source)
    assert list(again.reused) == []
    assert again.notes == [f"vectors in {out} are float32: 2 matrices computed again for float64"]
    assert kept_in(out) == {"float64"}
    usual = spectra.decompose(source, top=TOP, out=out)
    list(usual)
    assert (len(usual.reused), list(usual.notes)) == (len(source), [])
    more = spectra.decompose(source, top=TOP + 1, out=out)
    assert {spectrum.k for spectrum in more} == {TOP + 1}
    assert kept_in(out) == {"float64"}  # as much as was there
    spectra.save(spectra.load(out), out)
    assert kept_in(out) == {"float64"}
    values = spectra.decompose(source, out=tmp_path / "values")
    list(values)
    for_vectors = spectra.decompose(source, out=tmp_path / "values", vectors="float64")
    list(for_vectors)
    assert len(for_vectors.reused) == len(source)


def test_what_an_older_version_stored_is_read_as_it_is_and_serves(tmp_path, source):
    out = tmp_path / "run"
    found = run(out, source, vectors="float64")
    for path in (out / "spectra").iterdir():
        with safe_open(path, framework="np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            said = json.loads(file.metadata()["signed"])
        record = json.loads(said["record"])
        for new in ("vectors", "measured", "measured_by"):
            del record[new]
        said = said | {"record": json.dumps(record)}
        said.pop("checksum")
        save_file(arrays, path, shelf.signed(said))
    for spectrum in spectra.load(out):
        same_spectrum(spectrum, found[spectrum.name])
    for precision in ("float32", "float64"):
        again = spectra.decompose(source, top=TOP, out=out, vectors=precision)
        list(again)
        assert len(again.reused) == len(source)


def test_an_unknown_precision_is_refused_before_anything_is_done(tmp_path, source):
    with pytest.raises(SelectionError, match=r"vectors='float16' \(--vectors\) is not one of float32, float64"):
        spectra.decompose(source, top=TOP, out=tmp_path / "run", vectors="float16")
    with pytest.raises(SelectionError, match="is not one of"):
        spectra.save([], tmp_path / "run", vectors="double")
    assert not (tmp_path / "run").exists()


def test_the_command_keeps_either(tmp_path, source):
    arguments = ["svd", source.tuned, "--base", source.base, "--top", str(TOP), "--no-figures", "--out"]
    for precision in ("float32", "float64"):
        out = tmp_path / precision
        shown = CliRunner().invoke(main, [*arguments, str(out), "--vectors", precision])
        assert shown.exit_code == 0, shown.output
        assert kept_in(out) == {precision}
        assert spectra.load(out).run["vectors"] == precision


def test_stored_metrics_are_those_that_would_be_measured_and_of_this_code_only(tmp_path, source, monkeypatch):
    found = run(tmp_path / "run", source)
    asked = []
    usual = measuring.measured_together
    monkeypatch.setattr(measuring, "measured_together", lambda *a: asked.extend(a[0]) or usual(*a))
    table = spectra.load(tmp_path / "run").to_frame()
    assert asked == []
    monkeypatch.setattr(measured, "code", lambda: "another")
    fresh = spectra.load(tmp_path / "run").to_frame()
    assert len(asked) == len(source)
    assert table.equals(fresh)
    assert table.equals(spectra.summarize([found[name] for name in table["name"]]))


@pytest.mark.parametrize("wrong", [None, "x", [], [1.0], {"a": 1}])
def test_metrics_that_do_not_fit_are_measured_again(tmp_path, source, wrong):
    out = tmp_path / "run"
    run(out, source)
    name = source.deltas[0].name
    store = Store(out).spectra
    arrays, record = store.get(name)
    right = spectra.load(out).to_frame()
    store.put(name, arrays, record | {"measured": wrong})
    assert spectra.load(out).to_frame().equals(right)
