"""A sound file of another run, copied into a results directory, is no result of that run."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support.checkpoints import llama_tensors, nudged, write_checkpoint

import spectra
from spectra.errors import StoreError
from spectra.results.store import Store
from spectra.spectrum import Spectrum


@pytest.fixture
def runs(tmp_path):
    """Two runs of different updates of one base; and one of the first with a file for each matrix, not a pack."""
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    made = []
    for seed in (1, 2):
        tuned = write_checkpoint(tmp_path / f"tuned{seed}", nudged(llama_tensors(), seed))
        out = tmp_path / f"run{seed}"
        list(spectra.decompose(spectra.open_source(tuned, base), top=2, out=out))
        made.append(out)
    return made


def _a_file(run):
    return min((run / "spectra").glob("*.safetensors"))


def test_a_copied_record_is_said_not_believed(runs):
    name = spectra.load(runs[0]).names[0]
    shutil.copy(Store(runs[1]).spectra.path(name), Store(runs[0]).spectra.path(name))
    with pytest.raises(StoreError, match="of another run"):
        spectra.load(runs[0])[name]
    bad = [found for found in spectra.check_results(runs[0]) if found.state == "damaged"]
    assert len(bad) == 1
    assert "of another run" in bad[0].reason


def test_the_same_run_again_computes_it_anew(runs, tmp_path):
    name = spectra.load(runs[0]).names[0]
    before = spectra.load(runs[0])[name].S
    shutil.copy(Store(runs[1]).spectra.path(name), Store(runs[0]).spectra.path(name))
    source = spectra.open_source(tmp_path / "tuned1", tmp_path / "base")
    list(spectra.decompose(source, top=2, out=runs[0]))
    np.testing.assert_array_equal(spectra.load(runs[0])[name].S, before)
    assert all(found.state == "sound" for found in spectra.check_results(runs[0]))


def test_a_record_that_the_run_never_had_is_told_by_a_check(runs):
    more = Spectrum("model.layers.9.self_attn.q_proj.weight", (2, 2), S=[2.0, 1.0])
    spectra.save([more], runs[1].parent / "more")
    (file,) = (runs[1].parent / "more" / "spectra").glob("*.safetensors")
    shutil.copy(file, runs[0] / "spectra")
    (bad,) = [found for found in spectra.check_results(runs[0]) if found.state == "damaged"]
    assert "no such piece" in bad.reason


def test_packs_are_held_to_the_list_too(tmp_path):
    for run in (1, 2):
        store = Store(tmp_path / f"run{run}")
        for at in range(300):
            store.put(Spectrum(f"layers.{at}.w", (2, 2), S=[2.0 * run, 1.0]), key=f"{run}")
        store.finish()
    shutil.copy(tmp_path / "run2/spectra/small.pack", tmp_path / "run1/spectra/small.pack")
    with pytest.raises(StoreError, match="of another run"):
        spectra.load(tmp_path / "run1")["layers.299.w"]
    assert [found.state for found in spectra.check_results(tmp_path / "run1")].count("damaged") == 1


def test_saving_over_results_makes_them_belong(runs):
    name = spectra.load(runs[0]).names[0]
    shape = spectra.load(runs[0])[name].shape
    full = np.eye(*shape)
    k = min(shape)
    new = Spectrum(name, shape, S=np.arange(k, 0.0, -1), U=full[:, :k], Vh=np.eye(k, shape[1]))
    spectra.save([new], runs[0])
    assert spectra.load(runs[0])[name].S[0] == k
    assert all(found.state == "sound" for found in spectra.check_results(runs[0]))


def test_a_killed_run_has_no_list_and_is_read(runs):
    store = Store(runs[0])
    run = store.run()
    assert set(run["made_from"]) == set(store.names())
    store.begin(run["inputs"], {})
    name = store.names()[0]
    store.put(Spectrum(name, (2, 2), S=[2.0, 1.0]), key="new")
    assert spectra.load(runs[0])[name].S[0] == 2.0
