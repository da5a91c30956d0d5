"""`draw_results` from Python: what `spectra plot` draws, and no more than was asked for."""

from __future__ import annotations

import csv
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import spectra
from spectra.cli import plot as command
from spectra.cli.report import keep_table
from spectra.errors import SelectionError, StoreError
from spectra.plots import figures, histogram, stored
from spectra.plots import tables as drawing
from spectra.plots.stored import run_labels
from spectra.spectrum import Spectrum

rng = np.random.default_rng(3)
ROLES = ("q_proj", "v_proj")


def made(scale=1.0):
    vectors = [np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(8)]
    names = [f"layers.{layer}.{role}.weight" for layer in range(2) for role in ROLES]
    S = scale * np.arange(6, 0, -1.0)
    return [Spectrum(name, (6, 6), S=S, U=vectors[2 * i], Vh=vectors[2 * i + 1].T) for i, name in enumerate(names)]


@pytest.fixture
def runs(tmp_path):
    """Two runs and their comparison on both sides."""
    for name, scale in (("a", 1.0), ("b", 0.5)):
        spectra.save(made(scale), tmp_path / name)
    pair = (spectra.load(tmp_path / "a"), spectra.load(tmp_path / "b"))
    list(spectra.compare(*pair, top=3, sides=("left", "right"), out=tmp_path / "sim"))
    return tmp_path


def rows(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def column(path, key):
    return list(dict.fromkeys(row[key] for row in rows(path)))


def test_one_run_is_a_curve_per_role_beside_its_numbers(runs):
    drawn = spectra.draw_results(runs / "a")
    assert [path.name for path in drawn.files] == [
        f"{name}.{kind}" for name in ("histogram", "depth") for kind in ("png", "pdf", "csv")
    ]
    assert {path.parent for path in drawn.files} == {runs / "a"}
    assert all(path.stat().st_size for path in drawn.files)
    assert column(runs / "a/histogram.csv", "curve") == list(ROLES)
    assert drawn.notes == ()


def test_several_runs_are_a_curve_each(runs):
    spectra.draw_results([runs / "a", runs / "b"], runs / "out", labels=["one", "two"], layers="v_proj", bins=10)
    assert column(runs / "out/histogram.csv", "curve") == ["one", "two"]
    whole = [row for row in rows(runs / "out/histogram.csv") if row["panel"] == "all values"]
    assert len(whole) == 2 * 10
    assert sum(int(row["count"]) for row in whole) == 2 * 2 * 6


def test_names_and_sides_draw_what_was_asked_for_and_no_more(runs):
    v_proj = [f"layers.{layer}.v_proj.weight" for layer in range(2)]
    drawn = spectra.draw_results(str(runs / "sim"), runs / "out", names=v_proj, sides=("right",))
    assert [path.name for path in drawn.files] == ["similarity.png", "similarity.pdf", "similarity_grid.csv"]
    assert column(runs / "out/similarity_grid.csv", "panel") == ["v_proj, right"]
    spectra.draw_results(runs / "sim", runs / "out")
    assert len(column(runs / "out/similarity_grid.csv", "panel")) == 4
    spectra.draw_results(runs / "a", runs / "out", names=v_proj[::-1])
    assert column(runs / "out/histogram.csv", "curve") == ["v_proj"]


def test_what_does_not_fit_is_noted(tmp_path):
    spectra.save([Spectrum("layers.0.v_proj.weight", (2, 2), "unchanged", S=[0.0, 0.0])], tmp_path / "same")
    drawn = spectra.draw_results(tmp_path / "same")
    assert drawn.files == ()
    assert drawn.notes == ("no histogram: there is no nonzero singular value to draw: are all updates unchanged?",)
    many = [Spectrum(f"layers.0.role_{i}.weight", (2, 2), S=[2.0, 1.0]) for i in range(9)]
    spectra.save(many, tmp_path / "many")
    (note,) = spectra.draw_results(tmp_path / "many").notes
    assert "role_7, role_8; draw them with layers= (--layer)" in note
    assert spectra.draw_results(tmp_path / "many", per_layer=True).notes == ()
    with pytest.raises(SelectionError, match="'jpg' is not one of the formats png, pdf, svg"):
        spectra.draw_results(tmp_path / "many", formats=["jpg"])


HEADS = {"status": "ok", "heads": 3, "cosine": 0.1, "update_cosine": 0.2, "norm": 1.0}
BETWEEN = {"status": "ok", "mean_cosine": 0.2, "norm_ratio": 1.2, "sti": 3.0, "mean_sar": 0.5, "sar_chance": 0.1,
           "shared": 0.4, "shared_null": 0.3, "cosines": [[1.0, 0.2], [0.2, 1.0]]}  # fmt: skip
TABLES = {
    "heads": (HEADS, ["heads.svg", "heads_depth.csv"]),
    "interference": (BETWEEN, ["cosines.svg", "cosines.csv", "interference_depth.svg", "interference_depth.csv"]),
    "intruders": ({"status": "ok", "k": 10, "intruders": 2}, ["intruders_depth.svg", "intruders_depth.csv"]),
}


def kept(directory, name, one):
    found = [one | {"name": f"layers.{i}.{role}.weight", "role": role, "layer": i} for i in range(3) for role in ROLES]
    keep_table(str(directory), name, {"tuned": ["runs/a", "runs/b"], "matrices": found})
    return directory


@pytest.mark.parametrize("name", TABLES)
def test_the_table_of_every_command_is_drawn_beside_its_numbers_and_left_as_it_is(name, tmp_path):
    one, files = TABLES[name]
    directory = kept(tmp_path / name, name, one)
    before = (directory / f"{name}.csv").read_bytes()
    drawn = spectra.draw_results(directory, formats=["svg"], title="my words", layers="v_proj")
    assert [path.name for path in drawn.files] == files
    assert (directory / f"{name}.csv").read_bytes() == before
    for path in drawn.files:
        if path.suffix == ".csv" and "role" in rows(path)[0]:
            assert column(path, "role") == ["v_proj"]
    with pytest.raises(SelectionError, match=f"{name}: layer pattern 'up_proj' matches none"):
        spectra.draw_results(directory, layers="up_proj")


def test_every_table_that_a_command_keeps_has_its_drawing():
    sources = [path.read_text(encoding="utf-8") for path in Path(command.__file__).parent.glob("*.py")]
    written = {name for text in sources for name in re.findall(r'keep_table\(out, "(\w+)"', text)}
    assert {f"{name}.json" for name in written | {"alignment", "intruders"}} == set(drawing._DRAWERS)


def test_tables_of_several_directories_lie_beside_each_other(tmp_path):
    one, files = TABLES["heads"]
    places = [kept(tmp_path / place / "run", "heads", one) for place in "ab"]
    drawn = spectra.draw_results(places, tmp_path / "out", formats=["svg"], labels=["a/1", "b: 2"])
    assert [path.name for path in drawn.files] == [
        "heads-a-1.svg", "heads_depth-a-1.csv", "heads-b-2.svg", "heads_depth-b-2.csv",
    ]  # fmt: skip
    assert len(files) == 2


def test_a_table_without_a_number_to_draw_is_a_note(tmp_path):
    directory = kept(tmp_path / "none", "heads", HEADS | {"cosine": None, "update_cosine": None, "norm": None})
    drawn = spectra.draw_results(directory)
    assert drawn.files == ()
    assert drawn.notes == (f"no figure of {directory / 'heads.json'}: no matrix in a layer has a number to draw over "
                           "the layers",)  # fmt: skip


def test_what_is_not_there_is_an_error_that_names_the_directory(runs):
    with pytest.raises(StoreError, match=r"nowhere does not exist; make them with decompose"):
        spectra.draw_results(runs / "nowhere")
    with pytest.raises(SelectionError, match="sim: layer pattern 'k_proj' matches none of the 4"):
        spectra.draw_results(runs / "sim", layers="k_proj")
    pair = (spectra.load(runs / "a"), spectra.load(runs / "b"))
    list(spectra.compare(*pair, top=3, out=runs / "left"))
    with pytest.raises(SelectionError, match=r"left: nothing is stored for side right \(sides=, --side\), only left"):
        spectra.draw_results(runs / "left", sides=("right",))


def test_directories_are_called_by_their_folder_or_their_path_or_as_it_is_said(tmp_path):
    assert run_labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    twice = [str(tmp_path / "a/x"), str(tmp_path / "b/x")]
    assert run_labels(twice) == twice
    assert run_labels(twice, ["one", "two"]) == ["one", "two"]
    with pytest.raises(SelectionError, match="1 labels for 2 directories"):
        run_labels(twice, ["one"])
    with pytest.raises(SelectionError, match=r"2 directories are called 'one'.*\(labels=, --label\)"):
        run_labels(twice, ["one", "one"])


def test_the_command_has_the_defaults_of_the_function():
    defaults = {name: item.default for name, item in inspect.signature(spectra.draw_results).parameters.items()}
    assert (command.KINDS, command.USUAL) == (stored.KINDS, stored.USUAL)
    assert (command.BINS, command.CLOSE_UP, command.FORMATS) == (histogram.BINS, figures.CLOSE_UP, figures.FORMATS)
    assert (defaults["bins"], defaults["close_up"]) == (histogram.BINS, figures.CLOSE_UP)
