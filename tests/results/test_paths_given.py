"""A path where updates or spectra are wanted: one message that says what opens it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spectra
from spectra.errors import SelectionError

OF_UPDATES = {
    "alignment": spectra.alignment,
    "intruders": spectra.intruders,
    "head_similarity": spectra.head_similarity,
    "interference": lambda path: spectra.interference([path, path]),
}
OF_SPECTRA = {
    "summarize": spectra.summarize,
    "save": lambda path: spectra.save(path, "there"),
    "rank_plan": lambda path: spectra.rank_plan(path, rank=1),
    "plot_depth": lambda path: spectra.plot_depth(path, "norm"),
    "a plot": spectra.plot_histogram,
}


@pytest.mark.parametrize("path", ["tuned", Path("tuned")])
@pytest.mark.parametrize("function", OF_UPDATES)
def test_where_updates_are_wanted(function, path):
    with pytest.raises(SelectionError, match=rf"^{function} takes updates, not a path: open_source\('tuned', base=…\)"):
        OF_UPDATES[function](path)


@pytest.mark.parametrize("path", ["tuned", Path("tuned")])
@pytest.mark.parametrize("function", OF_SPECTRA)
def test_where_spectra_are_wanted(function, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SelectionError, match=rf"^{function} takes spectra, not a path: load\('tuned'\)"):
        OF_SPECTRA[function](path)
    assert not list(tmp_path.iterdir())


def test_one_path_in_place_of_several_updates():
    with pytest.raises(SelectionError, match="interference takes updates, not a path"):
        spectra.interference("tuned")


ONE = spectra.WeightDelta.from_tensor("w", torch.eye(2))
MODEL = torch.nn.Sequential(torch.nn.Linear(2, 2))  # which can be iterated over, as a list of updates can


@pytest.mark.parametrize("model", [MODEL, MODEL[0], MODEL.state_dict()])
@pytest.mark.parametrize(
    "function", [*OF_UPDATES.values(), spectra.decompose, lambda model: spectra.compare(model, model),
                 lambda model: spectra.compare_all({"a": model, "b": model})],
)  # fmt: skip
def test_a_model_where_updates_are_wanted(function, model):
    with pytest.raises(SelectionError, match=r"takes updates, not a model \(\w+\): open_source\(model, base=…\)"):
        function(model)


@pytest.mark.parametrize("function", [spectra.decompose, spectra.alignment, spectra.head_similarity])
def test_one_update_in_place_of_several(function):
    with pytest.raises(SelectionError, match="takes several updates, and was given one WeightDelta"):
        function(ONE)


def test_one_spectrum_in_place_of_several():
    with pytest.raises(SelectionError, match="summarize takes several spectra, and was given one Spectrum"):
        spectra.summarize(spectra.decompose([ONE]).collect()[0])


def test_one_source_where_two_interfere_and_a_list_where_names_are_wanted():
    source = spectra.open_source({"w.weight": torch.ones(2, 2)}, {"w.weight": torch.zeros(2, 2)})
    with pytest.raises(SelectionError, match="interference is between updates, and 1 was given"):
        spectra.interference(source)
    with pytest.raises(SelectionError, match="compare_all takes what each update is called"):
        spectra.compare_all([source, source])


def test_one_checkpoint_is_a_series_of_one(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SelectionError, match=r"^checkpoint: neither its name"):
        spectra.series("checkpoint")
