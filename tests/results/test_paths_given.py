"""A path where updates or spectra are wanted: one message that says what opens it."""

from __future__ import annotations

from pathlib import Path

import pytest

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
