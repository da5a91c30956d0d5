"""What other commands keep is on the page, too: with their numbers, their squares, and nobody's folders."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from support.hostile_names import ATTACK, HOSTILE
from support.spectra_runs import matrices

import spectra
from spectra.errors import StoreError
from spectra.report.kept import TABLES
from spectra.report.paths import shorter, without_places
from spectra.results import run_file
from spectra.results.tables import to_csv
from spectra.spectrum import Spectrum

ROLES = ("q_proj", "v_proj")


def rows(**numbers):
    return [
        {"name": f"layers.{i}.{role}.weight", "role": role, "layer": i, "status": "ok", "note": "", "reason": "",
         **{key: value[2 * i + j] if isinstance(value, list) else value for key, value in numbers.items()}}
        for i in range(3) for j, role in enumerate(ROLES)
    ]  # fmt: skip


def square(value):
    return [[1.0, value], [value, 1.0]]


NUMBERS = [0.5, 0.25, 0.125, 0.75, 0.3, 0.6]
DOCUMENTS = {
    "alignment.json": {"kind": "lora", "tuned": "/home/someone/secret/lora", "base": "base",
                       "options": {"k": 10, "epsilon": 0.5},
                       "matrices": rows(k=10, intruders=[0, 1, 2, 0, 0, 1], left_in_top=NUMBERS, left_chance=0.1,
                                        right_in_top=NUMBERS, right_chance=0.1, amplification=NUMBERS,
                                        amplification_random=0.5)},
    "interference.json": {"tuned": ["runs/a", "runs/b"],
                          "matrices": [row | {"cosines": square(0.25)} for row in
                                       rows(mean_cosine=0.25, norm_ratio=NUMBERS, sti=1.5, mean_sar=0.4)]},
    "heads.json": {"tuned": "a", "matrices": rows(heads=3, cosine=NUMBERS, chance=0.05, norm=1.0, update_cosine=0.1)},
    "verify.json": {"verdict": "damaged", "untouched": 28, "base": "b", "adapter": "a", "merged": "m",
                    "matrices": [row | {"verdict": "damaged" if row["residual"] == NUMBERS[-1] else "rounded",
                                         "cause": "two adapters"}
                                 for row in rows(scale=1.0, residual=NUMBERS, rounding=NUMBERS)]},
}  # fmt: skip
SAID = {
    "alignment.json": "4 intruder dimensions in 6 matrices",
    "interference.json": "most alike: a and b, 0.25",
    "heads.json": "The cosine of two heads is 0.4 in the median over 6 modules",
    "verify.json": "The adapter in the merged model: damaged. 6 matrices: 5 rounded, 1 damaged.",
    "series.csv": "‖ΔW‖_F goes from 0.4 to 3.",
}


@pytest.fixture
def kept(tmp_path):
    """A folder for each table, as the commands leave it."""
    for name, document in DOCUMENTS.items():
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(json.dumps({"spectra": "0.1.0"} | document))
    series = [{"step": step, "checkpoint": f"c-{step}", **row} for step in (8, 16) for row in
              rows(norm=[step / 8 * value for value in NUMBERS] if step == 8 else 3.0, stable_rank=2.0, top_1_share=0.5,
                   effective_rank=3.0, phi_to_last=0.9)]  # fmt: skip
    (tmp_path / "series").mkdir()
    (tmp_path / "series/series.csv").write_text(to_csv(series))
    return tmp_path


def page(directories, target, **options):
    spectra.write_report(directories, target, **options)
    return target.read_text(encoding="utf-8")


def tables_of(markup):
    (found,) = re.findall(r'<script type="application/json" id="numbers">(.*?)</script>', markup, re.S)
    return {table["id"]: table for table in json.loads(found)["tables"]}


def test_every_table_that_a_command_keeps_has_a_section():
    assert {*DOCUMENTS, "series.csv"} == set(TABLES)


@pytest.mark.parametrize("name", SAID)
def test_a_page_of_one_table_says_what_it_found(kept, tmp_path, name):
    markup = page(kept / name.split(".")[0], tmp_path / "page.html")
    assert SAID[name] in markup
    assert 'id="section-0"' in markup
    assert "matrices" not in tables_of(markup), "there are no spectra"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_number_is_the_tables(kept, tmp_path, name):
    table = tables_of(page(kept / name.split(".")[0], tmp_path / "page.html"))["kept-0"]
    keys = [column["key"] for column in table["columns"]]
    expected = list(csv.DictReader(to_csv(DOCUMENTS[name]["matrices"]).splitlines()))
    assert len(table["rows"]) == len(expected) == 6
    for shown, line in zip(table["rows"], expected, strict=True):
        for key, value in zip(keys, shown, strict=True):
            assert str("" if value is None else value) == line[key], key
    assert set(keys) == {key for key, value in DOCUMENTS[name]["matrices"][0].items() if not isinstance(value, list)}


def test_a_layer_pattern_chooses_rows_of_tables_too(kept, tmp_path):
    markup = page([kept / "heads", kept / "series"], tmp_path / "page.html", layers="v_proj")
    found = tables_of(markup)
    assert {row[0] for row in found["kept-0"]["rows"]} == {f"layers.{i}.v_proj.weight" for i in range(3)}
    assert {row[1] for row in found["kept-1"]["rows"]} == {"v_proj"}


def test_several_kinds_stand_on_one_page_with_spectra_and_pairs(kept, tmp_path):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    for i in range(3):
        one = Spectrum("layers.0.v_proj.weight", (8, 8), S=np.arange(8, 0, -1.0), U=np.roll(basis, i, 1), Vh=basis)
        spectra.save([one], tmp_path / f"m{i}")
    opened = {f"m{i}": spectra.load(tmp_path / f"m{i}") for i in range(3)}
    pairs = spectra.Pairs(spectra.compare_all(opened, top=3, out=tmp_path / "pairs"))
    spectra.save(list(matrices(1)), tmp_path / "full")
    names = ["full", "pairs", *(name.split(".")[0] for name in SAID)]
    markup = page([kept / name for name in names], tmp_path / "page.html")
    for sentence in SAID.values():
        assert sentence in markup
    sections = re.findall(r'<section id="section-\d">(.*?)</section>', markup, re.S)
    squares = re.findall(
        r"<span>(.*?)</span>", re.findall(r'<figure class="heat roomy square">.*?</figure>', sections[0], re.S)[0]
    )
    assert squares == [f"{value:.2f}" for value in pairs.square("left").ravel()]


def test_a_damaged_table_is_named(kept, tmp_path):
    (kept / "heads/heads.json").write_text('{"matrices": [1]}')
    with pytest.raises(StoreError, match=r"heads\.json is damaged"):
        page(kept / "heads", tmp_path / "page.html")
    (kept / "alignment/alignment.json").write_text('{"matrices": [{"name": "a", "status": "ok"}]}')
    with pytest.raises(StoreError, match=r"alignment\.json is damaged \(it lacks 'intruders'\)"):
        page(kept / "alignment", tmp_path / "page.html")


def test_a_strangers_names_in_tables_are_text(tmp_path):
    attack = f"</td></script><script>{ATTACK}</script>"
    found = [row | {"name": name, "role": attack, "verdict": attack, "cause": attack, "note": attack}
             for row, name in zip(rows(residual=0.1, rounding=0.1, scale=1.0) * 2, HOSTILE, strict=False)]  # fmt: skip
    (tmp_path / "verify").mkdir()
    (tmp_path / "verify/verify.json").write_text(json.dumps({"verdict": attack, "merged": attack, "matrices": found}))
    markup = page(tmp_path / "verify", tmp_path / "page.html", title=attack)
    assert markup.count("<script") == 2
    assert "<script>window.hit" not in markup


def test_the_page_does_not_say_where_files_lie(kept, tmp_path):
    place = "/home/someone/secret/deep"
    failed = Spectrum("layers.0.v_proj.weight", (2, 2), "failed", reason=f"{place}/x.bin is damaged")
    noted = Spectrum("layers.1.v_proj.weight", (2, 2), S=[1.0], note=f"read from {place}/y.bin")
    spectra.save([failed, noted], tmp_path / "run")
    path, files = tmp_path / "run/run.json", {f"{place}/tuned/model.safetensors": {"size": 1}}
    record = {
        "inputs": {"tuned": f"{place}/tuned", "base": "org/name", "files": files},
        "command": [f"{place}/bin/spectra", "svd", f"{place}/tuned", "--out", "/home/someone/secret/out"],
        "coverage": {"warnings": [f"{place}/tuned/a.bin was not read"], "skipped": {"x": f"not in {place}/b.bin"}},
    }
    run_file.write(path, run_file.read(path) | record)
    markup = page([tmp_path / "run", kept / "alignment"], tmp_path / "page.html")
    assert "someone" not in markup
    for told in ("…/deep/tuned", "…/tuned/model.safetensors", "org/name", "…/deep/x.bin is damaged", "…/deep/y.bin",
                 "…/tuned/a.bin was not read", "spectra svd …/deep/tuned --out …/secret/out"):  # fmt: skip
        assert told in markup.replace("<wbr>", "").replace("'", "").replace("&#39;", "").replace("\\u2026", "…"), told


def test_pairs_of_updates_are_called_by_what_tells_them_apart_and_not_by_where_they_lie(tmp_path):
    vectors = np.eye(4)[:, :2]
    run = spectra.Spectra([Spectrum("layers.0.v_proj.weight", (4, 4), S=[2.0, 1.0], U=vectors, Vh=vectors.T)])
    updates = {f"/home/someone/secret/{name}/step-9": run for name in "abc"}
    list(spectra.compare_all(updates, top=1, out=tmp_path / "pairs"))
    markup = page(tmp_path / "pairs", tmp_path / "page.html")
    assert "someone" not in markup
    assert "pairs: a and b" in markup


def test_matrices_that_no_update_changes_have_no_square_and_are_not_counted(tmp_path):
    nothing = {"cosines": [[None, None], [None, None]], "mean_cosine": None}
    rows = [{"name": f"layers.{layer}.{role}.weight", "role": role, "layer": layer, "status": "ok", "norm_ratio": 1.0}
            | (nothing if role == "up_proj" else {"cosines": [[1, 0.25], [0.25, 1]], "mean_cosine": 0.25})
            for layer in (0, 1) for role in ("up_proj", "v_proj", "q_proj")]  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run/interference.json").write_text(json.dumps({"tuned": ["a", "b"], "matrices": rows}))
    markup = page(tmp_path / "run", tmp_path / "page.html")
    assert "0.25 in the median over 4 matrices" in markup
    titles = re.findall(r"<figcaption><b>(\w+)</b></figcaption>\s*<div class=\"scroll\"", markup)
    assert titles == ["all", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("C:\\Users\\me\\models\\tuned", "…/models/tuned"),
        ("/tuned", "…/tuned"),
        ("tuned/", "tuned/"),
        ("org/name", "org/name"),
        ("gs://bucket/a/b", "gs://bucket/a/b"),
        ("~/models/a", "~/models/a"),
    ],
)
def test_paths_are_shorter_and_other_names_stay(path, told):
    assert shorter(path) == told


def test_words_that_are_no_paths_stay():
    for words in ("a/b of c/d, W/W₀ at 3/4", "https://host/a/b and hf://org/name/x", "‖ΔW‖_F/‖W₀‖_F is .1 / .2"):
        assert without_places(words) == words
