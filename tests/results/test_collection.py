"""`Spectra`: the same laws in memory and on disk; what is saved, what comes back, and what stays on the disk."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest
from support.spectra_kinds import same_spectrum

import spectra
from spectra.errors import SelectionError, StoreError
from spectra.results.store import Shelf
from spectra.spectrum import Spectrum


def made() -> list[Spectrum]:
    """One with vectors, one unchanged, one without numbers; not in the order of a directory."""
    return [
        Spectrum("layers.10.v_proj.weight", (3, 2), S=[2.0, 0.1], U=np.eye(3)[:, :1], Vh=np.eye(2)[:1], method="x"),
        Spectrum("layers.9.v_proj.weight", (3, 2), "unchanged", S=np.zeros(2), unmoved_share=1.0),
        Spectrum("a/b c[q]:\u03c3.weight", (3, 2), "nonfinite", reason="2 entries are NaN"),
    ]


@pytest.fixture(params=["memory", "disk"])
def collection(request, tmp_path):
    if request.param == "memory":
        return spectra.Spectra(sorted(made(), key=lambda spectrum: len(spectrum.name)))
    spectra.save(made(), tmp_path / "run")
    return spectra.load(tmp_path / "run")


def test_everything_is_found_by_index_slice_name_and_pattern(collection):
    assert len(collection) == 3
    assert collection.names == tuple(spectrum.name for spectrum in collection)
    assert collection.names[1:] == ("layers.9.v_proj.weight", "layers.10.v_proj.weight")  # 9 before 10
    for spectrum in made():
        same_spectrum(collection[spectrum.name], spectrum)
        assert spectrum.name in collection
        assert spectrum in collection
    assert collection[0].name == collection.names[0]
    assert collection[-1].name == collection.names[-1]
    assert collection[1:].names == collection.names[1:]
    assert collection[1:].select("layers.9.*").names == ("layers.9.v_proj.weight",)
    assert collection.select(["v_proj", "a/b*"]).names == collection.names
    assert "other" not in collection


def test_what_is_not_there_is_an_error(collection):
    with pytest.raises(KeyError, match="'other' is not among the 3"):
        collection["other"]
    with pytest.raises(IndexError):
        collection[3]
    with pytest.raises(SelectionError, match="matches none of the 3"):
        collection.select("k_proj")
    with pytest.raises(KeyError, match="not among the 2"):
        collection.select("v_proj")[collection.names[0]]


def test_it_is_what_every_function_of_spectra_takes(collection, tmp_path):
    assert spectra.plot_histogram(collection).get_xlabel().startswith("−ln σ")
    assert spectra.histogram_figure({"a": collection, "b": collection.select("v_proj")}).axes
    pd.testing.assert_frame_equal(collection.to_frame(), spectra.summarize(collection))
    pd.testing.assert_frame_equal(collection.to_frame(by="role"), spectra.summarize(collection, by="role"))
    spectra.save(collection, tmp_path / "again")
    for spectrum in made():
        same_spectrum(spectra.load(tmp_path / "again")[spectrum.name], spectrum)
    compared = list(spectra.compare(collection, collection, top=1))
    assert [item.phi for item in compared if isinstance(item, spectra.SubspaceSimilarity)] == [1.0]


def test_k_counts_the_vectors_that_exist_whether_they_are_loaded_or_not(tmp_path):
    spectra.save(made(), tmp_path / "run")
    for view in (
        spectra.load(tmp_path / "run", vectors=False),
        spectra.load(tmp_path / "run").without_vectors(),
        spectra.load(tmp_path / "run", vectors=False).select("v_proj")[:],
    ):
        spectrum = view["layers.10.v_proj.weight"]
        assert (spectrum.U, spectrum.Vh, spectrum.k) == (None, None, 1)
        assert view.to_frame().set_index("name").loc["layers.10.v_proj.weight", "k"] == 1
        assert "top 1 vectors" in repr(spectrum)
    with (tmp_path / "run" / "summary.csv").open() as file:
        assert [line["k"] for line in csv.DictReader(file)] == ["0", "0", "1"]
    with pytest.raises(SelectionError, match="not loaded; load them with vectors=True"):
        spectra.subspace_similarity(spectrum, spectrum)


def test_only_what_is_loaded_is_saved_again(tmp_path):
    spectra.save(made(), tmp_path / "run")
    values = spectra.load(tmp_path / "run", vectors=False)
    spectra.save(values, tmp_path / "values")
    assert [spectrum.k for spectrum in spectra.load(tmp_path / "values")] == [0, 0, 0]
    with pytest.raises(StoreError, match=r"1 vectors of layers.10.v_proj.weight, more than the new 2 and 0"):
        spectra.save(values, tmp_path / "run")


def test_the_table_reads_no_vectors(tmp_path, monkeypatch):
    spectra.save(made(), tmp_path / "run")
    asked = []
    get = Shelf.get
    monkeypatch.setattr(Shelf, "get", lambda self, name, only=None: asked.append(only) or get(self, name, only))
    spectra.load(tmp_path / "run").to_frame()
    assert asked == [("S",)] * 3


def test_a_stored_collection_reads_each_when_it_is_asked_for(tmp_path, monkeypatch):
    spectra.save(made(), tmp_path / "run")
    stored = spectra.load(tmp_path / "run")
    opened = []
    get = Shelf.get
    monkeypatch.setattr(Shelf, "get", lambda self, name, only=None: opened.append(name) or get(self, name, only))
    assert len(stored.select("v_proj")[::-1]) == 2
    assert opened == []
    next(iter(stored))
    assert opened == [stored.names[0]]


def test_memory_keeps_the_given_order_and_refuses_two_of_a_name():
    assert spectra.Spectra(made()).names == tuple(spectrum.name for spectrum in made())
    assert len(spectra.Spectra()) == 0
    with pytest.raises(SelectionError, match=r"layers.10.v_proj.weight is there twice"):
        spectra.Spectra([*made(), made()[0]])


def test_a_collection_knows_where_it_is(tmp_path):
    spectra.save(made(), tmp_path / "run")
    stored = spectra.load(tmp_path / "run")
    assert stored.directory == tmp_path / "run"
    assert "methods" in stored.run
    assert (spectra.Spectra(made()).directory, spectra.Spectra(made()).run) == (None, {})


def test_save_does_not_replace_more_by_less(tmp_path):
    rich = Spectrum("w", (2, 2), S=[2.0, 1.0], U=np.eye(2), Vh=np.eye(2))
    spectra.save([rich], tmp_path / "run")
    with pytest.raises(StoreError, match="more than the new"):
        spectra.save([Spectrum("w", (2, 2), S=[2.0, 1.0])], tmp_path / "run")
    same_spectrum(spectra.load(tmp_path / "run")["w"], rich)


def test_nothing_to_load_is_an_error(tmp_path):
    with pytest.raises(
        StoreError, match=r"(?:holds no results|does not exist); make them with decompose\(…, out=.*or spectra svd"
    ):
        spectra.load(tmp_path)


def test_a_folder_of_results_directories_is_told_with_their_names(tmp_path):
    for i in range(8):
        spectra.save([Spectrum("w", (1, 1), S=[1.0])], tmp_path / "spectra" / f"run-{i}")
    with pytest.raises(StoreError) as told:
        spectra.load(tmp_path)
    assert str(told.value) == (
        f"{tmp_path} itself holds no results, but folders in it do: spectra/run-0, spectra/run-1, spectra/run-2, "
        f"spectra/run-3, spectra/run-4, spectra/run-5 and 2 more; give one of them, such as {tmp_path}/spectra/run-0"
    )
    assert spectra.load(tmp_path / "spectra" / "run-0").names == ("w",)


def test_folders_inside_results_of_another_kind_are_not_offered(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    spectra.save([Spectrum("w", (1, 1), S=[1.0])], tmp_path / "pairs" / "a-b")
    with pytest.raises(StoreError, match="holds no results; make them"):
        spectra.load(tmp_path)


def test_every_table_that_is_drawn_tells_a_folder_of_results():
    from spectra.plots.tables import _DRAWERS
    from spectra.report.kept import _SECTIONS
    from spectra.results.homes import KEPT
    from spectra.results.series_table import TABLE
    from spectra.results.store import RUN

    assert {RUN, TABLE, *_DRAWERS, *_SECTIONS} == set(KEPT)
