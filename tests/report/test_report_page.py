"""The page as text: every number is the csv's, every name is text, nothing comes from elsewhere, and it stays small."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from support.command_line import run as command
from support.hostile_names import HOSTILE
from support.spectra_runs import matrices

import spectra
from spectra import text
from spectra.errors import MissingExtraError, SelectionError, StoreError
from spectra.plots.depth import scale
from spectra.report import cells, page
from spectra.spectrum import Spectrum


class Page(HTMLParser):
    """The elements of a page, and the text inside each kind of them."""

    VOID = ("meta", "br", "rect", "line", "path", "img", "input", "link", "wbr")

    def __init__(self, markup):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], {}, []
        self.feed(markup)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def made(tmp_path):
    """Makes a page and reads it."""

    def make(directories, **options):
        spectra.write_report(directories, tmp_path / "page.html", **options)
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return make


def numbers(markup):
    """The numbers inside the page."""
    (found,) = re.findall(r'<script type="application/json" id="numbers">(.*?)</script>', markup, re.S)
    return json.loads(found)


def table(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_every_number_of_the_tables_is_the_csvs(runs, made):
    document = numbers(made([runs / "first", runs / "second", runs / "same"]))
    matrices, similarities = document["tables"]
    for part, file, names in (
        (matrices, "summary.csv", ("first", "second")),
        (similarities, "similarity.csv", ("same",)),
    ):
        keys = [column["key"] for column in part["columns"]]
        expected = [(name, line) for name in names for line in table(runs / name / file)]
        assert len(part["rows"]) == len(expected)
        for row, (name, line) in zip(part["rows"], expected, strict=True):
            shown = dict(zip(keys, row, strict=True))
            assert shown.pop("run") == name
            assert (
                shown.pop("shape", "×".join((line.get("out", ""), line.get("in", ""))))
                == f"{line.get('out', '')}×{line.get('in', '')}"
            )
            assert shown.keys() == line.keys()
            for key, value in shown.items():
                assert str("" if value is None else value) == line[key], (line["name"], key)


def test_the_cells_over_depth_are_the_csvs(runs, made):
    markup = made(runs / "second")
    rows = {(line["layer"], line["role"]): line for line in table(runs / "second/summary.csv")}
    for metric in ("relative_norm", "stable_rank", "rank_90"):
        block = re.search(rf'id="depth-{metric}">(.*?)</figure>', markup, re.S)[1]
        lines = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', block)
        assert [role for role, _ in lines] == ["q_proj", "v_proj"]
        for role, line in lines:
            shown = re.findall(r"<span>(.*?)</span>", line)
            assert shown == [text.figure(float(rows[str(layer), role][metric])) for layer in range(3)]


def test_the_medians_by_role_are_the_tables(runs, made):
    markup = made(runs / "second")
    section = re.search(r'<section id="roles">(.*?)</section>', markup, re.S)[1].replace("<wbr>", "")
    by_role = spectra.load(runs / "second").to_frame(by="role").set_index("role")
    columns = re.findall(r'<th scope="col">(.*?)</th>', section)[1:]
    for role, line in re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', section):
        shown = dict(zip(columns, re.findall(r"<td>(.*?)</td>", line), strict=True))
        for metric in ("norm", "stable_rank", "effective_rank", "top_8_share"):
            assert shown[metric] == text.figure(float(by_role.loc[role, metric]))


def test_the_bars_count_every_value(runs, made):
    markup = made(runs / "second")
    section = re.search(r'<section id="histogram">(.*?)</section>', markup, re.S)[1]
    counts = [int(count) for count in re.findall(r'data-tip="[^"]*: (\d+) of 72 values', section)]
    assert sum(counts) == 2 * 3 * 24


def test_curves_are_points_of_the_stored_spectra(runs, made):
    matrices = numbers(made(runs / "second"))["tables"][0]
    stored = spectra.load(runs / "second")
    for row, curve in zip(matrices["rows"], matrices["curves"], strict=True):
        spectrum = stored[row[0]]
        assert [point[0] for point in curve["points"]][:: len(curve["points"]) - 1] == [1, 24]
        energy = np.cumsum(spectrum.S**2) / spectrum.norm**2
        for index, sigma, share in curve["points"]:
            assert sigma == float(f"{spectrum.S[index - 1]:.4g}")
            assert share == pytest.approx(energy[index - 1], rel=1e-3)
        assert curve["edge"] == spectrum.noise_edge


def test_nothing_is_loaded_from_anywhere_and_only_the_pages_own_script_may_run(runs, made):
    markup = made([runs / "first", runs / "same"])
    seen = Page(markup)
    assert not {"img", "link", "iframe", "object", "form", "base"} & set(seen.tags)
    for tag, key, value in seen.attributes:
        assert key not in ("src", "srcset", "style", "action", "background"), (tag, key)
        assert not key.startswith("on"), (tag, key)
        assert key != "href" or value.startswith("#")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", markup)
    policy = next(value for _, key, value in seen.attributes if key == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; ")
    for kind, tag in (("style", "style"), ("script", "script")):
        source = "".join(re.findall(rf"<{tag}>(.*?)</{tag}>", markup, re.S))
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_links_on_the_page_lead_somewhere(runs, made):
    for directories in (runs / "first", runs / "same", [runs / "first", runs / "second", runs / "same"]):
        seen = Page(made(directories))
        ids = [value for _, key, value in seen.attributes if key == "id"]
        assert len(set(ids)) == len(ids)
        targets = {value[1:] for _, key, value in seen.attributes if key == "href"}
        assert targets <= set(ids)
        assert {value for _, key, value in seen.attributes if key == "data-show"} <= set(ids)


def test_a_strangers_names_are_text(hostile, made):
    markup = made(hostile, title=HOSTILE[0], labels=[HOSTILE[1]])
    seen = Page(markup)
    assert seen.tags.count("script") == 2
    assert seen.tags.count("style") == 1
    assert not {"img", "b onclick", "i"} & set(seen.tags)
    assert not [key for _, key, _ in seen.attributes if key.startswith("on") or key == "autofocus"]
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", markup)
    names = [row[0] for row in numbers(markup)["tables"][0]["rows"]]
    assert set(map(text.visible, HOSTILE)) <= set(names)
    assert "\\u202egnp.exe" in "".join(names)
    assert "{{ 7 * 7 }}" in "".join(names), "no template runs inside a name"


def test_what_could_not_be_done_and_what_was_not_used_is_told(runs, made, source):
    markup = made(runs / "first")
    assert "3 entries are NaN" in markup
    assert "shared by two" in markup
    spectra.decompose(source, out=runs / "files").collect()
    markup = made(runs / "files").replace("<wbr>", "")
    for words in ("a vector, not a matrix", "model.safetensors", "torch ", "Tensors without a row"):
        assert words in markup


def test_it_stays_under_three_megabytes_and_says_what_it_leaves_out(tmp_path, made):
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight"
        for i in range(12)
        for e in range(64)
        for p in ("up", "down")
    ]
    S = np.geomspace(1, 1e-6, 300)
    many = spectra.Spectra(Spectrum(name, (300, 300), S=(1 + i) * S, base_norm=1.0) for i, name in enumerate(names * 1))
    more = [Spectrum(f"{'x' * 300}.{i}.weight", (2, 2), S=[1e-9], max_rank=1) for i in range(900)]
    markup = made(spectra.Spectra([*many, *more]))
    assert len(markup.encode()) < page.MOST_BYTES
    (matrices,) = numbers(markup)["tables"]
    total = len(many) + len(more)
    assert len(matrices["rows"]) < total
    assert f"Of {total:,} matrices, {len(matrices['rows']):,} are listed" in markup
    assert names[-1] in [row[0] for row in matrices["rows"]], "the largest are kept"


def test_a_page_that_cannot_be_made_small_enough_is_refused(runs, made, monkeypatch):
    monkeypatch.setattr(page, "MOST_BYTES", 30_000)
    with pytest.raises(SelectionError, match=r"the page would have 0\.\d MB with 1 runs, .*--layer"):
        made(runs / "first")


def test_a_comparison_of_several_updates_is_a_run_for_every_two(runs, made):
    spectra.save(list(matrices(3)), runs / "third")
    held = {name: spectra.load(runs / name) for name in ("first", "second", "third")}
    list(spectra.compare_all(held, top=4, out=runs / "all"))
    markup = made(runs / "all")
    table_of, kept = numbers(markup)["tables"]
    assert len(kept["rows"]) == 3 * 2, "every two, by role"
    pairs = {f"all: {a} and {b}" for a, b in (("first", "second"), ("first", "third"), ("second", "third"))}
    assert {row[0] for row in table_of["rows"]} == pairs
    assert len(table_of["rows"]) == 3 * 6


def test_a_name_longer_than_any_models_is_cut(made):
    markup = made(spectra.Spectra([Spectrum("a" * 100_000, (1, 1), S=[1.0])]))
    assert "… (100,000 characters)" in markup
    assert len(markup) < 200_000


def test_a_collection_writes_its_page(tmp_path, runs):
    spectra.Spectra([Spectrum("layers.0.v_proj.weight", (2, 2), S=[2.0, 1.0])]).report(tmp_path / "memory.html")
    markup = (tmp_path / "memory.html").read_text()
    assert "1 matrix: 1 changed." in markup
    assert "No record of where these results come from" in markup
    stored = spectra.load(runs / "second").select("v_proj")
    assert stored.report(str(tmp_path / "stored.html")) == tmp_path / "stored.html"
    assert stored.report() == runs / "second/report.html"
    assert stored.report().is_file()
    with pytest.raises(SelectionError, match=r"in no directory: .*\.report"):
        spectra.Spectra([Spectrum("a", (1, 1), S=[1.0])]).report()
    markup = (tmp_path / "stored.html").read_text()
    assert "<h1>second</h1>" in markup
    assert len(numbers(markup)["tables"][0]["rows"]) == 3


def test_labels_layers_and_mistakes(runs, made, monkeypatch, tmp_path):
    assert "<h1>one and two</h1>" in made([runs / "first", runs / "second"], labels=["one", "two"])
    assert len(numbers(made(runs / "first", layers="q_proj"))["tables"][0]["rows"]) == 4
    for wrong, error, words in (
        ({"directories": runs / "nowhere"}, StoreError, "nowhere does not exist"),
        ({"directories": []}, SelectionError, "no results directory"),
        ({"directories": runs / "first", "labels": ["a", "b"]}, SelectionError, "2 labels for 1"),
        (
            {"directories": runs / "first", "layers": "w_proj"},
            SelectionError,
            "first: layer pattern 'w_proj' matches none",
        ),
    ):
        with pytest.raises(error, match=words):
            made(**wrong)
    (runs / "other").mkdir()
    (runs / "other/alignment.json").write_text("{}")
    with pytest.raises(StoreError, match=r"alignment.json is damaged \(it holds no rows"):
        made(runs / "other")
    with pytest.raises(StoreError, match="cannot be written"):
        spectra.write_report(runs / "first", runs)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'weight-spectra\[report\]'"):
        made(runs / "first")


def test_the_command(runs, monkeypatch):
    monkeypatch.chdir(runs)
    out, _ = command(
        "report", "first", "second", "--out", "new/page.html", "--label", "a", "--label", "b", "--title", "T"
    )
    assert out == "new/page.html\n"
    assert "<h1>T</h1>" in (runs / "new/page.html").read_text()
    assert "1 labels for 2" in command("report", "first", "second", "--label", "a", "--out", "p.html", status=2)[1]
    assert "--out is missing: the page to write, such as --out page.html" in command("report", "first", status=2)[1]
    assert "nowhere does not exist" in command("report", "nowhere", "--out", "p.html", status=1)[1]


@pytest.mark.parametrize("model", ["https://host/org/name", "s3://bucket/name", "hf://org/name", "org/name@v1"])
@pytest.mark.parametrize("more", [(), ("--out", "page.html")])
def test_a_model_elsewhere_is_no_results_and_the_message_says_what_makes_them(model, more, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = command("report", model, *more, status=1)[1]
    assert f"{model} is an address" in said or f"{model} does not exist on this disk" in said
    assert f"spectra svd {model} … --out results" in said
    assert not (tmp_path / "page.html").exists()
    (tmp_path / "org").mkdir()
    assert "org/name does not exist; make them with" in command("report", "org/name", status=1)[1]


@pytest.mark.parametrize("limits", [(0.2, 1.0), (0.9, 1.0), (1.0, 1000.0), (-1.0, 1.0), (0.0, 3.0), (2.0, 2.0)])
def test_the_colours_are_those_of_the_figures(limits):
    norm = scale(limits)
    for value in np.linspace(*limits, 7).tolist():
        step = min(max(int(cells.LEVELS * float(norm(value))), 0), cells.LEVELS - 1)
        assert abs(cells.level(value, limits) - step) <= (0 if limits[0] < limits[1] else cells.LEVELS)


def test_a_run_of_nothing_but_failures_has_a_page(made):
    failed = [Spectrum(f"layers.{i}.v_proj.weight", (2, 2), "failed", reason="no memory") for i in range(2)]
    markup = made(spectra.Spectra(failed))
    assert 'id="histogram"' not in markup
    assert "2 could not be done" in markup
    assert "no memory" in markup
